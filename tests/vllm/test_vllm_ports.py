"""Workers on vLLM listen on loopback only, wherever the environment would have vLLM and torch listen."""

from __future__ import annotations

import psutil
import pytest
from listening import listening, own_address
from stacks import running_stack
from vllm_stacks import engines


def test_workers_on_vllm_listen_on_loopback_only(vllm_pair, monkeypatch):
    outside = own_address()
    if outside is None:
        pytest.skip("this machine has no address that others can reach")
    interface = next(
        name
        for name, addresses in psutil.net_if_addrs().items()
        if outside in (address.address for address in addresses)
    )
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", interface)  # as where the host's name has this address
    with running_stack(vllm_pair, **engines("vllm", "vllm")):
        found = listening([process.pid for process in psutil.Process().children(recursive=True)])
    assert len(found) >= 10, "torch's listeners are seen"
    beyond = {f"{table} {host}:{port}" for table, host, port in found if not host.is_loopback}
    assert not beyond

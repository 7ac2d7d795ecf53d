"""Workers on vLLM, and ranks, listen on loopback only, wherever the environment would have vLLM and torch listen."""

from __future__ import annotations

import psutil
import pytest
from listening import listening, own_address
from stacks import running_stack
from vllm_stacks import engines


@pytest.mark.timeout(400)
def test_workers_on_vllm_listen_on_loopback_only(vllm_pair, monkeypatch):
    outside = own_address()
    if outside is None:
        pytest.skip("this machine has no address that others can reach")
    interface = next(
        name
        for name, addresses in psutil.net_if_addrs().items()
        if outside in (address.address for address in addresses)
    )
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        monkeypatch.setenv(name, interface)  # as where the host's name has this address
    monkeypatch.setenv("VLLM_HOST_IP", outside)
    # One worker has ranks in processes of their own, and the other one in its own process.
    with running_stack(vllm_pair, prefill_tensor_parallel_size="2", **engines("vllm", "vllm")):
        processes = psutil.Process().children(recursive=True)
        found = listening([process.pid for process in processes])
        ranks = [listening([process.pid]) for process in processes if "VLLM::Worker" in process.name()]
    assert len(ranks) == 2
    assert all(ranks), "the ranks' listeners are seen"
    assert len(found) >= 12, "torch's listeners are seen"
    beyond = {f"{table} {host}:{port}" for table, host, port in found if not host.is_loopback}
    assert not beyond

"""Tests where the default stack listens: all sockets of all its processes, read from the kernel's tables."""

from __future__ import annotations

import os
import socket

import pytest
from listening import listening, own_address
from ray_stacks import up_on_ray

from overfill.client import Client, Grammar, SamplingParams


@pytest.mark.parametrize(
    ("arguments", "least"),
    [
        # Two ports of gRPC, one of HTTP, and one of metrics for each process.
        (["--no-ray"], 5),
        # On Ray, as by default, including Ray's own processes.
        pytest.param(["--engine=mock"], 10, marks=pytest.mark.slow),
    ],
    ids=["processes", "ray"],
)
def test_nothing_listens_beyond_loopback(tiny_pair, arguments, least):
    quick = ["--dtype=float32", "--kv-memory=4MiB", "--max-model-len=512", "--threads=1", "--grace-period=1"]
    with up_on_ray(f"--pair={tiny_pair}", "--http=0", *quick, *arguments) as up:
        with Client(f"127.0.0.1:{up.port}") as client:  # starts the helpers that try grammars
            client.generate([20, 21], sampling=SamplingParams(max_tokens=8, grammar=Grammar("regex", "[0-9]{3}")))
        pids = [process.pid for process in up.processes()]
        found = listening(pids)
        print(f"{len(pids)} processes listen on", *sorted(f"{table} {host}:{port}" for table, host, port in found))
        assert up.port in {port for _, _, port in found}
        assert len(found) >= least
        beyond = {f"{table} {host}:{port}" for table, host, port in found if not host.is_loopback}
        assert not beyond
        outside = own_address()
        if outside is not None:
            for table, _, port in found:
                if table.startswith("tcp"):
                    with pytest.raises(OSError):  # noqa: PT011  # refused, or unanswered
                        socket.create_connection((outside, port), 2).close()


def test_a_socket_that_is_open_to_others_would_be_seen():
    with socket.create_server(("0.0.0.0", 0)) as open_one, socket.create_server(("127.0.0.1", 0)) as own:
        found = {port: host.is_loopback for _, host, port in listening([os.getpid()])}
        assert found[open_one.getsockname()[1]] is False
        assert found[own.getsockname()[1]] is True

"""Tests what a worker announces about itself: its address, and how long its process took to start."""

import time

import pytest

from overfill.process import startup
from overfill.rpc.server import RpcServer
from overfill.rpc.worker import WorkerHandle, WorkerHost, announced
from overfill.v1 import decode_pb2, registry_pb2


@pytest.mark.parametrize(
    ("bound", "advertise", "address"),
    [
        ("127.0.0.1:7601", "", "127.0.0.1:7601"),
        ("0.0.0.0:7601", "gpu-1.internal", "gpu-1.internal:7601"),
        ("127.0.0.1:7601", "nat.internal:31007", "nat.internal:31007"),
        ("[::]:7601", "[2001:db8::1]:31007", "[2001:db8::1]:31007"),
        ("[::]:7601", "2001:db8::1", "[2001:db8::1]:7601"),
        ("[::]:7601", "[2001:db8::1]", "[2001:db8::1]:7601"),
    ],
)
def test_a_worker_is_announced_where_others_reach_it(bound, advertise, address):
    assert announced(bound, advertise) == address


async def test_a_worker_says_how_long_its_process_took_to_be_ready(monkeypatch):
    monkeypatch.setattr(startup, "_began", time.monotonic() - 1000.0)
    handle = WorkerHandle(decode_pb2.WorkerLoad, lambda: 0, lambda error: None, capacity=1, healthy=lambda: True)
    hello = registry_pb2.Hello(worker_id="w")
    host = WorkerHost(RpcServer(), hello, handle, routers=[], tls=None, grace=0.0)
    assert await host.run("127.0.0.1:0", lambda host: host.drain()) == 0
    assert 1000.0 <= hello.startup_seconds <= time.monotonic() - startup._began

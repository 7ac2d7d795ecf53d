"""Tests that calls to and from a frozen peer end, although it neither answers nor closes its connection."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from overfill.errors import Unavailable
from overfill.rpc.access import AccessPolicy, Rule
from overfill.rpc.channel import open_channel
from overfill.rpc.constants import KEEPALIVE_TIME
from overfill.rpc.server import RpcServer
from overfill.rpc.status import from_rpc_error

# Seconds: far more than keepalive needs, but less than the minute that gRPC waits with wrong settings.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(45)]

SERVER = """
import asyncio
from overfill.rpc.server import RpcServer

async def main():
    server = RpcServer()
    print(await server.start("127.0.0.1:0"), flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""

CLIENT = """
import asyncio, sys
from overfill.rpc.channel import open_channel

async def main():
    async with open_channel(sys.argv[1]) as channel:
        call = channel.unary_stream("/test.Hang/Hang")(b"")
        await call.read()

asyncio.run(main())
"""


@contextmanager
def child(code: str, *args: str) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen([sys.executable, "-c", code, *args], stdout=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


async def test_calls_to_a_frozen_server_end() -> None:
    with child(SERVER) as process:
        assert process.stdout is not None
        address = process.stdout.readline().strip()
        async with open_channel(address) as channel:
            watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
            await watch.read()
            os.kill(process.pid, signal.SIGSTOP)
            with pytest.raises(grpc.RpcError) as caught:
                await watch.read()
    assert isinstance(from_rpc_error(caught.value), Unavailable)


async def test_a_server_that_is_only_starved_keeps_its_calls() -> None:
    with child(SERVER) as process:
        assert process.stdout is not None
        address = process.stdout.readline().strip()
        async with open_channel(address) as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            watch = stub.Watch(health_pb2.HealthCheckRequest())
            await watch.read()
            reading = asyncio.ensure_future(watch.read())
            os.kill(process.pid, signal.SIGSTOP)
            # An overloaded machine may leave a ping unanswered for 5 s.
            await asyncio.sleep(KEEPALIVE_TIME + 5)
            os.kill(process.pid, signal.SIGCONT)
            await stub.Check(health_pb2.HealthCheckRequest())
            assert not reading.done()
            reading.cancel()


async def test_calls_from_a_frozen_client_are_cancelled() -> None:
    called, cancelled = asyncio.Event(), asyncio.Event()

    async def hang(request: bytes, context: Any) -> AsyncIterator[bytes]:
        called.set()
        try:
            await asyncio.Event().wait()
            yield b""
        finally:
            cancelled.set()

    def add(servicer: Any, server: Any) -> None:
        handlers = {"Hang": grpc.unary_stream_rpc_method_handler(servicer)}
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test.Hang", handlers),))

    server = RpcServer(access=AccessPolicy({"/test.Hang/Hang": Rule(open=True)}))
    server.add(add, hang, "test.Hang")
    with child(CLIENT, await server.start("127.0.0.1:0")) as process:
        await called.wait()
        os.kill(process.pid, signal.SIGSTOP)
        await cancelled.wait()
    await server.stop()

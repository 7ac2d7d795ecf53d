"""Tests the limits of what one caller may cost a server: connections, handshakes, missing messages, sizes."""

from __future__ import annotations

import asyncio
import contextlib

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from overfill.rpc import channel as channel_module
from overfill.rpc import interceptors
from overfill.rpc.channel import open_channel
from overfill.rpc.server import RpcServer

CHECK = "/grpc.health.v1.Health/Check"


async def serving() -> tuple[RpcServer, str]:
    server = RpcServer()
    address = await server.start("127.0.0.1:0")
    server.set_ready(True)
    return server, address


async def test_a_call_whose_message_never_arrives_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interceptors, "FIRST_MESSAGE_TIMEOUT", 0.2)
    server, address = await serving()
    async with open_channel(address) as channel:
        call = channel.stream_stream(CHECK)(timeout=60)  # type: ignore[call-arg]
        with pytest.raises(grpc.aio.AioRpcError, match=r"no message has arrived within 0\.2 s"):
            await call.read()
        assert await call.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        empty = channel.stream_stream(CHECK)(timeout=60)  # type: ignore[call-arg]
        await empty.done_writing()
        with pytest.raises(grpc.aio.AioRpcError, match="the request has no message"):
            await empty.read()
        assert (await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())).status == 1
    await server.stop()


async def test_metadata_and_messages_are_limited_in_size() -> None:
    server, address = await serving()
    async with open_channel(address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        for request, metadata in (
            (health_pb2.HealthCheckRequest(), (("x", "y" * 100_000),)),
            (health_pb2.HealthCheckRequest(service="x" * (9 << 20)), ()),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await stub.Check(request, metadata=metadata)
            assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    await server.stop()


async def closed(reader: asyncio.StreamReader, seconds: float) -> bool:
    """True if the server ends the connection within ``seconds``; data that it sends first is ignored."""
    with contextlib.suppress(ConnectionError):
        async with asyncio.timeout(seconds):
            try:
                while await reader.read(4096):
                    pass
            except TimeoutError:
                return False
    return True


async def test_an_unfinished_handshake_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channel_module, "HANDSHAKE_TIMEOUT", 0.5)
    server, address = await serving()
    host, _, port = address.rpartition(":")
    for said in (b"", b"PRI * HT"):
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(said)
        assert await closed(reader, 20)
        writer.close()
    await server.stop()


async def test_a_server_limits_its_connections(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channel_module, "MAX_CONNECTIONS", 3)
    server, address = await serving()
    async with contextlib.AsyncExitStack() as stack:
        for _ in range(3):
            channel = await stack.enter_async_context(open_channel(address))
            await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
        channel = await stack.enter_async_context(open_channel(address))
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=5)
        assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
    await server.stop()

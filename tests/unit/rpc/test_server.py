"""Tests a server and a channel on loopback: errors, health, limits, and the end of running calls."""

from __future__ import annotations

import asyncio
import gc
import time
import weakref
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from overfill import errors
from overfill.rpc import health as health_module
from overfill.rpc.access import RPCS, AccessPolicy, Rule
from overfill.rpc.addresses import is_loopback, split_address
from overfill.rpc.channel import open_channel, server_options
from overfill.rpc.constants import MAX_MESSAGE_BYTES, MAX_PENDING_RPCS
from overfill.rpc.server import RpcServer
from overfill.rpc.status import from_rpc_error
from overfill.rpc.tls import TlsError
from overfill.v1 import common_pb2

SERVICE = "test.Echo"
BAD_UTF8 = b"\x0a\x01\xff"  # ModelIdentity.name = "\xff"
Message = common_pb2.ModelIdentity


class Echo:
    """Answers with the request's name; "fail" raises an error, "hang" waits for ever."""

    def __init__(self) -> None:
        self.hanging = asyncio.Event()
        self.cleaned_up = asyncio.Event()

    async def check(self, message: Message) -> None:
        if message.name == "fail":
            raise errors.InvalidRequest("name", "told to fail")
        if message.name == "bug":
            raise KeyError("secret")
        if message.name == "hang":
            self.hanging.set()
            try:
                await asyncio.Event().wait()
            finally:
                self.cleaned_up.set()

    async def unary_unary(self, request: Message, context: Any) -> Message:
        if request.name == "abort":
            await context.abort(grpc.StatusCode.ABORTED, "by hand")
        if request.name == "peer":
            return Message(name=context.peer())
        await self.check(request)
        return request

    async def unary_stream(self, request: Message, context: Any) -> AsyncIterator[Message]:
        yield request
        if request.name == "flood":
            try:
                while True:
                    yield Message(name="x" * (1 << 20))
            finally:
                self.cleaned_up.set()
        await self.check(request)

    async def stream_unary(self, requests: AsyncIterator[Message], context: Any) -> Message:
        names = []
        async for request in requests:
            await self.check(request)
            names.append(request.name)
        return Message(name=",".join(names))

    async def stream_stream(self, requests: AsyncIterator[Message], context: Any) -> None:
        async for request in requests:
            await self.check(request)
            await context.write(request)


KINDS = ["unary_unary", "unary_stream", "stream_unary", "stream_stream"]
GATE = AccessPolicy({**RPCS, **{f"/{SERVICE}/{kind}": Rule(open=True) for kind in KINDS}})


def add_echo(servicer: Echo, server: Any) -> None:
    handlers = {
        kind: getattr(grpc, f"{kind}_rpc_method_handler")(
            getattr(servicer, kind), Message.FromString, Message.SerializeToString
        )
        for kind in KINDS
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))


@pytest.fixture
async def echo() -> Echo:
    return Echo()


@pytest.fixture
async def server(echo: Echo) -> AsyncIterator[RpcServer]:
    server = RpcServer(access=GATE)
    server.add(add_echo, echo, SERVICE)
    yield server
    await server.stop()


@pytest.fixture
async def channel(server: RpcServer) -> AsyncIterator[grpc.aio.Channel]:
    async with open_channel(await server.start("127.0.0.1:0")) as channel:
        yield channel


async def call(channel: grpc.aio.Channel, kind: str, *requests: Message | bytes) -> list[Message]:
    """Sends messages, or raw bytes; returns all responses."""

    def serialize(message: Message | bytes) -> bytes:
        return message if isinstance(message, bytes) else message.SerializeToString()

    method = getattr(channel, kind)(f"/{SERVICE}/{kind}", serialize, Message.FromString)
    rpc = method(iter(requests) if kind.startswith("stream") else requests[0])
    try:
        if kind.endswith("_unary"):
            return [await rpc]
        return [message async for message in rpc]
    except grpc.RpcError as error:
        raise from_rpc_error(error) from None


@pytest.mark.parametrize("kind", KINDS)
async def test_errors_arrive_typed(channel: grpc.aio.Channel, kind: str) -> None:
    with pytest.raises(errors.InvalidRequest, match="told to fail") as caught:
        await call(channel, kind, Message(name="fail"))
    assert caught.value.field == "name"


@pytest.mark.parametrize("kind", KINDS)
async def test_bugs_do_not_leak_and_leave_the_server_serving(channel: grpc.aio.Channel, kind: str) -> None:
    with pytest.raises(errors.InternalError, match="incident") as caught:
        await call(channel, kind, Message(name="bug"))
    assert "secret" not in str(caught.value)
    assert await call(channel, kind, Message(name="a")) == [Message(name="a")]


@pytest.mark.parametrize("kind", KINDS)
async def test_bytes_that_are_not_a_message_are_the_senders_fault(channel: grpc.aio.Channel, kind: str) -> None:
    with pytest.raises(errors.InvalidRequest, match="not a valid message"):
        await call(channel, kind, BAD_UTF8)


@pytest.mark.parametrize("kind", ["stream_unary", "stream_stream"])
async def test_a_later_invalid_message_of_a_stream_is_the_senders_fault(channel: grpc.aio.Channel, kind: str) -> None:
    with pytest.raises(errors.InvalidRequest, match="not a valid message"):
        await call(channel, kind, Message(name="a"), BAD_UTF8)


async def test_an_abort_by_the_servicer_keeps_its_status(
    channel: grpc.aio.Channel, caplog: pytest.LogCaptureFixture
) -> None:
    method = channel.unary_unary(f"/{SERVICE}/unary_unary", Message.SerializeToString, Message.FromString)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await method(Message(name="abort"))
    assert caught.value.code() is grpc.StatusCode.ABORTED
    assert caught.value.details() == "by hand"
    assert "incident" not in caplog.text


async def test_an_unknown_method_names_an_incompatible_peer(channel: grpc.aio.Channel) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await channel.unary_unary("/test.Echo/nothing")(b"")
    assert isinstance(from_rpc_error(caught.value), errors.Incompatible)


@pytest.mark.parametrize("name", ["hang", "flood"])
async def test_a_cancelled_call_runs_the_servicers_cleanup(channel: grpc.aio.Channel, echo: Echo, name: str) -> None:
    method = channel.unary_stream(f"/{SERVICE}/unary_stream", Message.SerializeToString, Message.FromString)
    rpc = method(Message(name=name))
    await rpc.read()
    if name == "hang":
        await echo.hanging.wait()
    else:
        await rpc.read()  # before, the servicer may not have begun what it cleans up
    rpc.cancel()
    await echo.cleaned_up.wait()


async def test_health_follows_set_ready(server: RpcServer, channel: grpc.aio.Channel) -> None:
    stub = health_pb2_grpc.HealthStub(channel)
    response = health_pb2.HealthCheckResponse
    for service in ("", SERVICE):
        request = health_pb2.HealthCheckRequest(service=service)
        assert (await stub.Check(request)).status == response.NOT_SERVING
        server.set_ready(True)
        assert (await stub.Check(request)).status == response.SERVING
        server.set_ready(False)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.Check(health_pb2.HealthCheckRequest(service="nobody" + "y" * 1_000_000))
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    details = caught.value.details()
    assert details is not None
    assert details.startswith("this server has no service 'nobodyyy")
    assert len(details) < 200


async def test_every_health_watcher_is_notified_and_none_delays_a_stop(
    server: RpcServer, channel: grpc.aio.Channel
) -> None:
    stub = health_pb2_grpc.HealthStub(channel)
    response = health_pb2.HealthCheckResponse
    leaver, stayer = (stub.Watch(health_pb2.HealthCheckRequest()) for _ in range(2))
    assert (await leaver.read()).status == (await stayer.read()).status == response.NOT_SERVING
    leaver.cancel()
    server.set_ready(True)
    assert (await stayer.read()).status == response.SERVING
    await server.stop(grace=3600)  # the test waits for less than that
    assert (await stayer.read()).status == response.NOT_SERVING
    assert await stayer.read() is grpc.aio.EOF


async def test_health_follows_a_condition_that_changes_without_an_event(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health_module, "LOOK_SECONDS", 0.01)
    holds = False
    server = RpcServer(condition=lambda: holds)
    address = await server.start("127.0.0.1:0")
    async with open_channel(address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        request, response = health_pb2.HealthCheckRequest(), health_pb2.HealthCheckResponse
        watcher = stub.Watch(request)
        server.set_ready(True)
        assert (await watcher.read()).status == response.NOT_SERVING
        for holds in (True, False, True):
            assert (await stub.Check(request)).status == (response.SERVING if holds else response.NOT_SERVING)
            assert (await watcher.read()).status == (response.SERVING if holds else response.NOT_SERVING)
        server.set_ready(False)
        assert (await stub.Check(request)).status == response.NOT_SERVING
        watcher.cancel()
    await server.stop()


async def test_reflection_lists_the_services(channel: grpc.aio.Channel) -> None:
    stub = reflection_pb2_grpc.ServerReflectionStub(channel)
    request = reflection_pb2.ServerReflectionRequest(list_services="")
    async for answer in stub.ServerReflectionInfo(iter([request])):
        names = {service.name for service in answer.list_services_response.service}
    assert {SERVICE, "grpc.health.v1.Health"} <= names


async def test_a_taken_port_is_refused(server: RpcServer) -> None:
    address = await server.start("127.0.0.1:0")
    second = RpcServer()
    with pytest.raises(errors.Unavailable, match=address):
        await second.start(address)
    await second.stop()


async def test_every_channel_has_its_own_connection(server: RpcServer) -> None:
    address = await server.start("127.0.0.1:0")
    async with open_channel(address) as one, open_channel(address) as two:
        peers = {(await call(channel, "unary_unary", Message(name="peer")))[0].name for channel in (one, two)}
    assert len(peers) == 2


async def test_a_message_over_the_limit_is_the_senders_fault(channel: grpc.aio.Channel) -> None:
    with pytest.raises(errors.InvalidRequest, match="larger than max"):
        await call(channel, "unary_unary", Message(name="x" * MAX_MESSAGE_BYTES))


async def test_a_burst_that_arrives_while_the_process_is_busy_is_served(channel: grpc.aio.Channel) -> None:
    """By default, gRPC cancels some of more than 1,000 RPCs that wait to be accepted."""
    assert ("grpc.server.max_pending_requests", MAX_PENDING_RPCS) in server_options()
    await call(channel, "unary_unary", Message(name="first"))
    method = channel.unary_unary(f"/{SERVICE}/unary_unary", Message.SerializeToString, Message.FromString)
    calls = [method(Message(name=str(number))) for number in range(4000)]
    for _ in range(3):
        await asyncio.sleep(0)
    time.sleep(0.5)  # noqa: ASYNC251  # the loop accepts nothing, while gRPC's threads receive
    answers = await asyncio.gather(*calls)
    assert [answer.name for answer in answers] == [str(number) for number in range(4000)]


async def test_a_unix_socket_serves(server: RpcServer, tmp_path: Path) -> None:
    address = await server.start(f"unix:{tmp_path}/s")
    async with open_channel(address) as channel:
        assert await call(channel, "unary_unary", Message(name="a")) == [Message(name="a")]


async def test_other_hosts_are_refused_without_tls() -> None:
    with pytest.raises(TlsError, match=r"0\.0\.0\.0:0 without TLS"):
        await RpcServer().start("0.0.0.0:0")


async def test_more_rpcs_than_allowed_are_refused_as_overload(echo: Echo) -> None:
    server = RpcServer(max_concurrent_rpcs=1, access=GATE)
    server.add(add_echo, echo, SERVICE)
    async with open_channel(await server.start("127.0.0.1:0")) as channel:
        first = asyncio.create_task(call(channel, "unary_unary", Message(name="hang")))
        await echo.hanging.wait()
        with pytest.raises(errors.Overloaded):
            await call(channel, "unary_unary", Message(name="a"))
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
    await server.stop()


async def test_running_calls_are_let_finish_within_the_grace(server: RpcServer, echo: Echo) -> None:
    async with open_channel(await server.start("127.0.0.1:0")) as channel:
        method = channel.stream_stream(f"/{SERVICE}/stream_stream", Message.SerializeToString, Message.FromString)
        rpc = method()
        await rpc.write(Message(name="a"))
        assert (await rpc.read()).name == "a"
        stopping = asyncio.create_task(server.stop(grace=60))
        await rpc.write(Message(name="b"))
        assert (await rpc.read()).name == "b"
        await rpc.done_writing()
        assert await rpc.read() is grpc.aio.EOF
        await stopping


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("127.0.0.1", True),
        ("127.8.9.10", True),
        ("localhost", True),
        ("::1", True),
        ("[::1]", True),
        ("0.0.0.0", False),
        ("[::]", False),
        ("10.0.0.1", False),
        ("localhost.evil.example", False),
        ("", False),
    ],
)
def test_is_loopback(host: str, expected: bool) -> None:
    assert is_loopback(host) is expected


def test_addresses_split() -> None:
    assert split_address("[::1]:80") == ("[::1]", 80)
    for bad in ("127.0.0.1", ":80", "a:b", "", "a:"):
        with pytest.raises(ValueError, match="host:port"):
            split_address(bad)


@pytest.mark.parametrize("kind", KINDS)
async def test_a_refused_call_leaves_nothing_to_the_garbage_collector(
    kind: str, echo: Echo, channel: grpc.aio.Channel, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Made:
        """What a servicer makes of a request."""

    freed = asyncio.Event()

    async def check(message: Message) -> None:
        made = Made()
        weakref.finalize(made, freed.set)
        raise errors.InvalidRequest("name", f"{made} is wrong")

    monkeypatch.setattr(echo, "check", check)
    gc.disable()
    try:
        with pytest.raises(errors.InvalidRequest):
            await call(channel, kind, Message(name="a"))
        async with asyncio.timeout(10):
            await freed.wait()
    finally:
        gc.enable()

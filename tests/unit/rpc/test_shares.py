"""Tests that one caller cannot use up a server's RPCs or memory with answers that it does not read."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import fuzz_http2
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from overfill.errors import Overloaded
from overfill.rpc import shares
from overfill.rpc.access import RPCS, AccessPolicy, Role, Rule, Scope
from overfill.rpc.channel import open_channel
from overfill.rpc.server import RpcServer
from overfill.rpc.shares import RpcShares
from overfill.rpc.status import from_rpc_error

CHECK = "/grpc.health.v1.Health/Check"
ECHO, HANG = "/test.Shares/Echo", "/test.Shares/Hang"
KEYS = {name: SimpleNamespace(name=name, scopes=frozenset({Scope.INFER})) for name in ("a", "b")}
SECRET = "the secret of the stack"
POLICY = AccessPolicy(
    {**RPCS, ECHO: Rule(Scope.INFER), HANG: Rule(Scope.INFER, frozenset({Role.WORKER}))}, KEYS.get, SECRET
)


async def echo(request: bytes, context: Any) -> bytes:
    return request


async def hang(request: bytes, context: Any) -> AsyncIterator[bytes]:
    yield b"begun"
    await asyncio.Event().wait()


def add(servicer: Any, server: Any) -> None:
    handlers = {"Echo": grpc.unary_unary_rpc_method_handler(echo), "Hang": grpc.unary_stream_rpc_method_handler(hang)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test.Shares", handlers),))


@asynccontextmanager
async def serving(max_rpcs: int, policy: AccessPolicy = POLICY) -> AsyncIterator[str]:
    server = RpcServer(max_concurrent_rpcs=max_rpcs, access=policy)
    server.add(add, None, "test.Shares")
    address = await server.start("127.0.0.1:0")
    server.set_ready(True)
    try:
        yield address
    finally:
        await server.stop()


class Unread:
    """A connection whose client lets the server send no message: its flow-control windows have 0 bytes."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer
        self._calls = 0

    @classmethod
    async def open(cls, address: str) -> Unread:
        host, _, port = address.rpartition(":")
        unread = cls(*await asyncio.open_connection(host, int(port)))
        unread._writer.write(fuzz_http2.PREFACE + fuzz_http2.settings(window=0))
        return unread

    def call(self, method: str, data: bytes = b"", key: str = "") -> None:
        stream, extra = 2 * self._calls + 1, [("authorization", f"Bearer {key}")] if key else []
        head = fuzz_http2.headers(method, extra)
        self._writer.write(
            fuzz_http2.frame(fuzz_http2.HEADERS, fuzz_http2.END_HEADERS, stream, head)
            + fuzz_http2.frame(fuzz_http2.DATA, fuzz_http2.END_STREAM, stream, fuzz_http2.message(data))
        )
        self._calls += 1

    async def ended(self, count: int) -> None:
        """Returns once the server has ended ``count`` of the calls."""
        while count:
            head = await self._reader.readexactly(9)
            await self._reader.readexactly(int.from_bytes(head[:3], "big"))
            count -= head[3] == fuzz_http2.HEADERS and head[4] & fuzz_http2.END_STREAM

    def close(self) -> None:
        self._writer.close()


async def ask(channel: grpc.aio.Channel, key: str, data: bytes = b"x") -> bytes:
    try:
        return await channel.unary_unary(ECHO)(data, metadata=[("authorization", f"Bearer {key}")])  # type: ignore[call-arg]
    except grpc.aio.AioRpcError as error:
        raise from_rpc_error(error) from None


async def check(channel: grpc.aio.Channel) -> None:
    await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())


async def test_unread_health_checks_leave_room_for_others() -> None:
    async with serving(64) as address, open_channel(address) as channel:
        unread = await Unread.open(address)
        for _ in range(200):
            unread.call(CHECK)
        await unread.ended(200 - 64 // shares.HOST_SHARE)  # refused, which ends them although nothing is read
        assert await ask(channel, "a") == b"x"
        with pytest.raises(grpc.aio.AioRpcError, match=r"host 127\.0\.0\.1 has 2 RPCs open") as refused:
            await check(channel)
        assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        unread.close()
        async with asyncio.timeout(20):
            while True:
                try:
                    await check(channel)
                    break
                except grpc.aio.AioRpcError:
                    await asyncio.sleep(0.01)  # until the server has seen that the client left


async def test_calls_without_a_key_do_not_stay_open() -> None:
    async with serving(64) as address, open_channel(address) as channel:
        unread = await Unread.open(address)
        for _ in range(200):
            unread.call(ECHO)
        await unread.ended(200)
        assert await ask(channel, "a") == b"x"
        unread.close()


async def test_a_key_has_its_share() -> None:
    async with serving(8) as address, open_channel(address) as channel:
        unread = await Unread.open(address)
        for _ in range(50):
            unread.call(ECHO, b"x", "a")
        await unread.ended(50 - 8 // shares.KEY_SHARE)
        with pytest.raises(Overloaded, match=r"API key 'a' has 4 RPCs open"):
            await ask(channel, "a")
        assert await ask(channel, "b") == b"x"
        unread.close()


async def test_processes_of_the_stack_have_no_share() -> None:
    async with serving(8) as address, open_channel(address) as channel:
        calls = [channel.unary_stream(HANG)(b"", metadata=[("authorization", f"Bearer {SECRET}")]) for _ in range(8)]  # type: ignore[call-arg]
        for call in calls:
            assert await call.read() == b"begun"
            call.cancel()


async def test_unread_answers_of_a_key_have_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shares, "MAX_UNREAD_BYTES", 2500)
    monkeypatch.setattr(shares, "SMALL_ANSWER", 100)
    large = b"x" * 1000
    async with serving(8192) as address, open_channel(address) as channel:
        unread = await Unread.open(address)
        for _ in range(10):
            unread.call(ECHO, large, "a")
        await unread.ended(8)
        with pytest.raises(Overloaded, match=r"API key 'a' has 2000 bytes of answers .* the maximum is 2500:"):
            await ask(channel, "a", large)
        assert await ask(channel, "a") == b"x", "small answers pass"
        assert await ask(channel, "b", large) == large
        unread.close()


@pytest.mark.parametrize("policy", [POLICY, AccessPolicy(POLICY.rpcs)], ids=["secret", "without keys"])
async def test_unread_answers_of_a_connection_leave_room_for_others(
    policy: AccessPolicy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shares, "MAX_UNREAD_BYTES", 4500)
    monkeypatch.setattr(shares, "SMALL_ANSWER", 100)
    large = b"x" * 1000
    async with serving(8192, policy) as address, open_channel(address) as channel:
        unread = await Unread.open(address)
        for _ in range(10):
            unread.call(ECHO, large, SECRET)
        await unread.ended(6)  # the limit of all would refuse no more
        assert await ask(channel, SECRET, large) == large
        unread.close()


def test_unread_answers_of_all_connections_have_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shares, "MAX_UNREAD_BYTES", 2_000_000)
    callers = RpcShares(100)
    rpcs = [callers.open(None, True, f"ipv4:192.0.2.1:{port}") for port in range(8)]
    unread = []
    for rpc in rpcs:
        with pytest.raises(Overloaded, match=r"this server has .* the maximum is 2000000, and for a connection"):
            for _ in range(100):
                rpc.answer(20_000)
        unread.append(rpc._unread // 20_000)
    assert unread == [50, 25, 12, 6, 3, 2, 1, 0]
    rpcs[0].end()
    rpcs[-1].answer(20_000)
    for rpc in rpcs[1:]:
        rpc.end()
    assert not callers._usages
    assert not callers._others.unread


def test_an_answer_larger_than_the_limit_passes_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shares, "MAX_UNREAD_BYTES", 100_000)
    callers = RpcShares(100)
    first, second = (callers.open(KEYS["a"], True, "") for _ in range(2))
    first.answer(200_000)
    with pytest.raises(Overloaded, match="200000 bytes"):
        second.answer(20_000)
    with pytest.raises(Overloaded, match="200000 bytes"):
        callers.open(KEYS["a"], True, "")
    first.end()
    second.answer(20_000)
    second.end()
    assert not callers._usages


@pytest.mark.parametrize(
    ("peers", "count"),
    [
        (["ipv4:192.0.2.1:1", "ipv4:192.0.2.1:2"], 1),
        (["ipv4:192.0.2.1:1", "ipv4:192.0.2.2:1"], 2),
        (["ipv6:%5B2001:db8::1%5D:1", "ipv6:%5B2001:db8:0:0:ffff::2%5D:1"], 1),  # a host has a network of 64 bits
        (["ipv6:%5B2001:db8::1%5D:1", "ipv6:%5B2001:db8:0:1::1%5D:1"], 2),
        (["ipv6:%5Bfe80::1%25eth0%5D:1", "ipv6:%5B::1%5D:1"], 2),
        (["unix:", "unix:/run/s"], 1),
    ],
)
def test_hosts_are_told_apart(peers: list[str], count: int) -> None:
    callers = RpcShares(8192)
    for peer in peers:
        callers.open(None, False, peer)
    assert len(callers._usages) == count + 1, "the hosts, and all of them together"


def test_all_hosts_together_have_a_share() -> None:
    callers = RpcShares(64)
    for host in range(64 // shares.OPEN_SHARE):
        callers.open(None, False, f"ipv4:192.0.2.{host}:1")
    with pytest.raises(Overloaded, match="everyone without a credential has 8 RPCs open"):
        callers.open(None, False, "ipv4:192.0.2.200:1")
    callers.open(KEYS["a"], True, "ipv4:192.0.2.1:1")
    callers.open(None, True, "ipv4:192.0.2.1:1")


def test_a_server_without_a_limit_has_no_shares() -> None:
    callers = RpcShares(None)
    for _ in range(10_000):
        callers.open(None, False, "ipv4:192.0.2.1:1")

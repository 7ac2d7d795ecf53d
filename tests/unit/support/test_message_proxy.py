"""The proxy that damages messages, over real gRPC on loopback."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator
from contextlib import suppress

import grpc
import grpc.aio
import pytest
from message_proxy import (
    Corrupt,
    Delay,
    Drop,
    Duplicate,
    Fault,
    HalfOpen,
    MessageProxy,
    Reorder,
    Rule,
    Stall,
    Throttle,
    Truncate,
)

from overfill.errors import InternalError, InvalidRequest
from overfill.rpc.calls import responses
from overfill.rpc.channel import open_channel
from overfill.rpc.server import RpcServer
from overfill.v1 import kv_pb2, prefill_pb2, prefill_pb2_grpc

SENT = [kv_pb2.KvChunk(payload=bytes([i]) * 100) for i in range(10)]


class Sender(prefill_pb2_grpc.PrefillServicer):
    def __init__(self) -> None:
        self.ended = asyncio.Event()
        self.heard = asyncio.Event()

    async def Prefill(
        self, request_iterator: AsyncIterator[prefill_pb2.PrefillRequest], context: object
    ) -> AsyncIterator[prefill_pb2.PrefillResponse]:
        try:
            async for _ in request_iterator:
                self.heard.set()
            yield prefill_pb2.PrefillResponse()
        finally:
            self.ended.set()

    async def PullKv(self, request: prefill_pb2.PullKvRequest, context: object) -> AsyncIterator[kv_pb2.KvChunk]:
        if request.attempt:
            raise InvalidRequest("attempt", "was given")
        try:
            for chunk in SENT:
                yield chunk
            if request.transfer_id:
                await asyncio.Event().wait()
        finally:  # cancelled while waiting, or closed while a chunk was being sent
            self.ended.set()


@pytest.fixture
async def sender() -> AsyncIterator[tuple[Sender, str]]:
    servicer = Sender()
    server = RpcServer()
    server.add(prefill_pb2_grpc.add_PrefillServicer_to_server, servicer, "overfill.v1.Prefill")
    yield servicer, await server.start("127.0.0.1:0")
    await server.stop()


async def received(address: str, request: prefill_pb2.PullKvRequest | None = None) -> list[bytes]:
    channel = open_channel(address)
    try:
        call = prefill_pb2_grpc.PrefillStub(channel).PullKv(request or prefill_pb2.PullKvRequest(), timeout=10)
        return [chunk.payload async for chunk in responses(call, "the sender")]
    finally:
        await channel.close(None)


def proxied(address: str, fault: Fault, seed: int = 0, **rule: object) -> MessageProxy:
    return MessageProxy(address, [Rule(fault, "Prefill/PullKv", **rule)], seed)  # type: ignore[arg-type]


PAYLOADS = [chunk.payload for chunk in SENT]


async def test_without_rules_everything_passes(sender: tuple[Sender, str]) -> None:
    async with MessageProxy(sender[1]) as proxy:
        assert await received(proxy.address) == PAYLOADS
        # Details in trailing metadata, from which the client makes our own error, come through.
        with pytest.raises(InvalidRequest, match="attempt: was given"):
            await received(proxy.address, prefill_pb2.PullKvRequest(attempt=1))


async def test_a_client_that_leaves_is_noticed_behind_the_proxy(sender: tuple[Sender, str]) -> None:
    async with MessageProxy(sender[1]) as proxy:
        channel = open_channel(proxy.address)
        call = prefill_pb2_grpc.PrefillStub(channel).PullKv(prefill_pb2.PullKvRequest(transfer_id=b"x"), timeout=10)
        await call.read()
        call.cancel()
        await asyncio.wait_for(sender[0].ended.wait(), 5)
        await channel.close(None)


async def test_a_deadline_passes_through(sender: tuple[Sender, str]) -> None:
    async with MessageProxy(sender[1]) as proxy:
        channel = open_channel(proxy.address)
        call = prefill_pb2_grpc.PrefillStub(channel).PullKv(prefill_pb2.PullKvRequest(transfer_id=b"x"), timeout=0.3)
        with pytest.raises(grpc.aio.AioRpcError) as error:
            async for _ in call:
                pass
        assert error.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
        await channel.close(None)


@pytest.mark.parametrize("seed", range(3))
async def test_each_fault_does_what_it_says(sender: tuple[Sender, str], seed: int) -> None:
    async with proxied(sender[1], Drop(within=10), seed) as proxy:
        got = await received(proxy.address)
        assert len(got) == 9
        assert set(got) < set(PAYLOADS)
    async with proxied(sender[1], Duplicate(within=10), seed) as proxy:
        got = await received(proxy.address)
        assert len(got) == 11
        assert [key for key, _ in itertools.groupby(got)] == PAYLOADS
    async with proxied(sender[1], Reorder(window=4), seed) as proxy:
        got = await received(proxy.address)
        assert got != PAYLOADS
        assert sorted(got) == sorted(PAYLOADS)
    async with proxied(sender[1], Delay(0.01), seed) as proxy:
        assert await received(proxy.address) == PAYLOADS
    for fault in (Corrupt(within=10), Truncate(within=10)):
        async with proxied(sender[1], fault, seed) as proxy:
            with suppress(InternalError):  # no longer a message of its type
                assert await received(proxy.address) != PAYLOADS


async def test_a_stalled_call_stays_open(sender: tuple[Sender, str]) -> None:
    async with proxied(sender[1], Stall(after=3)) as proxy:
        channel = open_channel(proxy.address)
        call = prefill_pb2_grpc.PrefillStub(channel).PullKv(prefill_pb2.PullKvRequest(), timeout=10)
        assert [(await call.read()).payload for _ in range(3)] == PAYLOADS[:3]
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(call.read(), 0.3)
        await channel.close(None)


async def test_a_half_open_call_has_ended_for_the_server_only(sender: tuple[Sender, str]) -> None:
    async with proxied(sender[1], HalfOpen(after=3)) as proxy:
        channel = open_channel(proxy.address)
        call = prefill_pb2_grpc.PrefillStub(channel).PullKv(prefill_pb2.PullKvRequest(transfer_id=b"x"), timeout=10)
        assert [(await call.read()).payload for _ in range(3)] == PAYLOADS[:3]
        await asyncio.wait_for(sender[0].ended.wait(), 5)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(asyncio.shield(asyncio.ensure_future(call.read())), 0.3)
        assert not call.done()
        await channel.close(None)


async def test_a_half_open_call_has_ended_for_the_client_only(sender: tuple[Sender, str]) -> None:
    async with MessageProxy(sender[1], [Rule(HalfOpen(after=1), "Prefill/Prefill", "request")]) as proxy:
        channel = open_channel(proxy.address)
        call = prefill_pb2_grpc.PrefillStub(channel).Prefill(timeout=10)
        await call.write(prefill_pb2.PrefillRequest())
        await asyncio.wait_for(sender[0].heard.wait(), 5)
        await call.write(prefill_pb2.PrefillRequest())
        with pytest.raises(grpc.aio.AioRpcError, match="the connection broke"):
            await call.read()
        assert not sender[0].ended.is_set()
        await channel.close(None)
    await asyncio.wait_for(sender[0].ended.wait(), 5)


async def test_a_limit_takes_its_time(sender: tuple[Sender, str]) -> None:
    loop = asyncio.get_running_loop()
    size = sum(chunk.ByteSize() for chunk in SENT)
    async with proxied(sender[1], Throttle(4 * size)) as proxy:
        before = loop.time()
        assert await received(proxy.address) == PAYLOADS
        assert loop.time() - before >= 0.25
        assert proxy.rules[0].hits == 10


async def test_rules_choose_calls(sender: tuple[Sender, str]) -> None:
    async with proxied(sender[1], Drop(), remaining=2) as proxy:
        counts = [len(await received(proxy.address)) for _ in range(4)]
        assert counts == [9, 9, 10, 10]
        assert proxy.rules[0].hits == 2
    async with MessageProxy(sender[1], [Rule(Drop(), "Prefill/Describe")]) as proxy:
        assert len(await received(proxy.address)) == 10
    async with proxied(sender[1], Drop(), fraction=0.5) as proxy:
        lengths = [len(await received(proxy.address)) for _ in range(40)]
        assert 8 < lengths.count(9) < 32

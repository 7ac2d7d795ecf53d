"""A gRPC proxy that damages, delays, drops or reorders messages. A seed chooses them; message types do not matter.

``overfill.lab.faults.proxy`` works on the bytes of a connection, so it forwards keepalive pings. This proxy opens
and accepts connections, so it answers pings itself.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import grpc
import grpc.aio

from overfill.rpc.channel import open_channel, server_options

Direction = Literal["request", "response"]


class ConnectionLost(Exception):
    """Raised by a filter: the call ends for the sender, and the receiver is not notified."""


class Filter(Protocol):
    """Transforms the messages of one direction of one call."""

    async def pass_on(self, message: bytes) -> list[bytes]:
        """Returns the messages to forward instead of ``message``. May wait, or raise ConnectionLost."""

    def end(self) -> list[bytes]:
        """Returns the messages still held back. Called when the sender has ended."""


OnHit = Callable[[], None]


class Fault(Protocol):
    """A kind of fault."""

    def begin(self, rng: random.Random, on_hit: OnHit) -> Filter:
        """Returns a filter for one call. The filter calls ``on_hit`` each time it injects the fault."""


@dataclass(slots=True)
class Rule:
    """A fault, and the calls to which it applies.

    Attributes:
        method: End of the full method name, such as ``Prefill/PullKv``. Empty means all methods.
        fraction: Fraction of these calls that get the fault, chosen at random.
        remaining: Number of further calls that get the fault. None means no limit.
        hits: Number of times the fault was injected so far.
    """

    fault: Fault
    method: str = ""
    direction: Direction = "response"
    fraction: float = 1.0
    remaining: int | None = None
    hits: int = 0

    def record_hit(self) -> None:
        self.hits += 1


class MessageProxy:
    """Forwards every RPC to ``target``, message by message, and applies the matching rules.

    Statuses, metadata, deadlines and cancellation are forwarded unchanged.
    """

    def __init__(self, target: str, rules: Sequence[Rule] = (), seed: int = 0) -> None:
        self.rules = list(rules)
        self._rng = random.Random(seed)
        self._channel = open_channel(target)
        self._server = grpc.aio.server(options=server_options())
        self._server.add_generic_rpc_handlers((_AnyMethod(self),))
        self._half_open: list[Any] = []
        self.address = ""

    async def __aenter__(self) -> MessageProxy:
        self.address = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        await self._server.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._server.stop(0)
        await self._channel.close(None)

    async def forward(self, method: str, requests: AsyncIterator[bytes], context: Any) -> None:
        """Forwards one call. On the wire every gRPC call is a stream in both directions, unary calls included."""
        to_server, to_client = self._filters(method)
        channel: Any = self._channel
        call = channel.stream_stream(method)(
            timeout=context.time_remaining(), metadata=_without_transport(context.invocation_metadata())
        )
        sending = asyncio.ensure_future(self._send(call, requests, to_server))
        writing = asyncio.Lock()  # towards the client: gRPC allows one operation at a time
        receiving = asyncio.ensure_future(self._receive(call, context, writing, to_client))
        ends = {receiving, sending}
        try:
            while not receiving.done():
                done, ends = await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
                if sending in done and isinstance(sending.exception(), ConnectionLost):
                    self._half_open.append(call)  # the server must not notice that the client has gone
                    async with writing:
                        await context.abort(grpc.StatusCode.UNAVAILABLE, "the connection broke")
            receiving.result()
        except ConnectionLost:
            call.cancel()
            await asyncio.Event().wait()  # until the client gives up
        except grpc.aio.AioRpcError as error:
            await context.abort(error.code(), error.details() or "", tuple(error.trailing_metadata() or ()))
        finally:
            sending.cancel()
            receiving.cancel()
            if call not in self._half_open:
                call.cancel()

    async def _receive(self, call: Any, context: Any, writing: asyncio.Lock, filters: Sequence[Filter]) -> None:
        metadata = await call.initial_metadata()
        async with writing:
            await context.send_initial_metadata(metadata)
        while (message := await call.read()) is not grpc.aio.EOF:  # type: ignore[attr-defined]
            for out in await _apply(filters, message):
                async with writing:
                    await context.write(out)
        for out in _flush(filters):
            async with writing:
                await context.write(out)
        context.set_trailing_metadata(tuple(await call.trailing_metadata() or ()))

    async def _send(self, call: Any, requests: AsyncIterator[bytes], filters: Sequence[Filter]) -> None:
        try:
            async for message in requests:
                for out in await _apply(filters, message):
                    await call.write(out)
            for out in _flush(filters):
                await call.write(out)
            await call.done_writing()
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            pass  # the call has ended; the reading side reports it

    def _filters(self, method: str) -> tuple[list[Filter], list[Filter]]:
        chosen: dict[Direction, list[Filter]] = {"request": [], "response": []}
        for rule in self.rules:
            if rule.remaining == 0 or not method.endswith(rule.method) or self._rng.random() >= rule.fraction:
                continue
            if rule.remaining is not None:
                rule.remaining -= 1
            chosen[rule.direction].append(rule.fault.begin(random.Random(self._rng.getrandbits(64)), rule.record_hit))
        return chosen["request"], chosen["response"]


class _AnyMethod(grpc.GenericRpcHandler):  # type: ignore[type-arg]
    def __init__(self, proxy: MessageProxy) -> None:
        self._proxy = proxy

    def service(self, handler_call_details: Any) -> Any:
        method = handler_call_details.method

        # A coroutine function, not a callable object: gRPC inspects it to recognise an asynchronous handler.
        async def handle(requests: AsyncIterator[bytes], context: Any) -> None:
            await self._proxy.forward(method, requests, context)

        return grpc.stream_stream_rpc_method_handler(handle)


async def _apply(filters: Sequence[Filter], message: bytes) -> list[bytes]:
    messages = [message]
    for filter_ in filters:
        messages = [out for item in messages for out in await filter_.pass_on(item)]
    return messages


def _flush(filters: Sequence[Filter]) -> list[bytes]:
    return [out for filter_ in filters for out in filter_.end()]


def _without_transport(metadata: Any) -> list[tuple[str, str | bytes]]:
    """Returns the metadata without the entries that gRPC sets itself."""
    return [(key, value) for key, value in metadata or () if not key.startswith((":", "grpc-")) and key != "user-agent"]


class _Unbuffered:
    """Mixin for filters that hold no messages back."""

    __slots__ = ()

    def end(self) -> list[bytes]:
        return []


@dataclass(slots=True)
class _ChangeOne(_Unbuffered):
    """A filter that applies ``change`` to message number ``at`` of the call."""

    change: Callable[[bytes], list[bytes]]
    at: int
    on_hit: OnHit
    seen: int = 0

    async def pass_on(self, message: bytes) -> list[bytes]:
        self.seen += 1
        if self.seen - 1 != self.at:
            return [message]
        self.on_hit()
        return self.change(message)


@dataclass(frozen=True, slots=True)
class _OneMessageFault:
    """A fault in one of the first ``within`` messages of a call."""

    within: int = 1

    def begin(self, rng: random.Random, on_hit: OnHit) -> Filter:
        return _ChangeOne(lambda message: self._change(message, rng), rng.randrange(self.within), on_hit)

    def _change(self, message: bytes, rng: random.Random) -> list[bytes]:
        raise NotImplementedError


class Corrupt(_OneMessageFault):
    """Flips one bit of one of the first ``within`` messages."""

    def _change(self, message: bytes, rng: random.Random) -> list[bytes]:
        damaged = bytearray(message)
        if damaged:
            damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
        return [bytes(damaged)]


class Truncate(_OneMessageFault):
    """Cuts off the end of one of the first ``within`` messages."""

    def _change(self, message: bytes, rng: random.Random) -> list[bytes]:
        return [message[: rng.randrange(max(1, len(message)))]]


class Duplicate(_OneMessageFault):
    """Sends one of the first ``within`` messages twice."""

    def _change(self, message: bytes, rng: random.Random) -> list[bytes]:
        return [message, message]


class Drop(_OneMessageFault):
    """Drops one of the first ``within`` messages."""

    def _change(self, message: bytes, rng: random.Random) -> list[bytes]:
        return []


@dataclass(frozen=True, slots=True)
class Delay:
    """Delays every message by up to ``seconds``. Each one counts as a hit."""

    seconds: float

    def begin(self, rng: random.Random, on_hit: OnHit) -> Filter:
        return _Delaying(self.seconds, rng, on_hit)


@dataclass(slots=True)
class _Delaying(_Unbuffered):
    seconds: float
    rng: random.Random
    on_hit: OnHit

    async def pass_on(self, message: bytes) -> list[bytes]:
        self.on_hit()
        await asyncio.sleep(self.rng.random() * self.seconds)
        return [message]


@dataclass(frozen=True, slots=True)
class Throttle:
    """Limits the bandwidth to ``bytes_per_second``. Each message counts as a hit."""

    bytes_per_second: float

    def begin(self, rng: random.Random, on_hit: OnHit) -> Filter:
        return _Throttling(self.bytes_per_second, on_hit)


@dataclass(slots=True)
class _Throttling(_Unbuffered):
    rate: float
    on_hit: OnHit
    free_at: float = 0.0

    async def pass_on(self, message: bytes) -> list[bytes]:
        now = asyncio.get_running_loop().time()
        self.free_at = max(self.free_at, now) + len(message) / self.rate
        self.on_hit()
        await asyncio.sleep(self.free_at - now)
        return [message]


@dataclass(frozen=True, slots=True)
class HalfOpen:
    """After ``after`` messages, ends the call for the sender only. It stays open and silent for the receiver."""

    after: int = 0

    def begin(self, rng: random.Random, on_hit: OnHit) -> Filter:
        return _HalfOpening(self.after, on_hit)


@dataclass(slots=True)
class _HalfOpening(_Unbuffered):
    left: int
    on_hit: OnHit

    async def pass_on(self, message: bytes) -> list[bytes]:
        if self.left == 0:
            self.on_hit()
            raise ConnectionLost
        self.left -= 1
        return [message]


@dataclass(frozen=True, slots=True)
class Stall:
    """Forwards ``after`` messages and then no more. The call stays open at both ends."""

    after: int = 0

    def begin(self, rng: random.Random, on_hit: OnHit) -> Filter:
        return _Stalling(self.after, on_hit)


@dataclass(slots=True)
class _Stalling(_Unbuffered):
    left: int
    on_hit: OnHit

    async def pass_on(self, message: bytes) -> list[bytes]:
        if self.left == 0:
            self.on_hit()
            await asyncio.Event().wait()
        self.left -= 1
        return [message]


@dataclass(frozen=True, slots=True)
class Reorder:
    """Holds up to ``window`` messages and forwards them in random order. Each that overtakes another is a hit."""

    window: int = 4

    def begin(self, rng: random.Random, on_hit: OnHit) -> Filter:
        return _Reordering(self.window, rng, on_hit)


@dataclass(slots=True)
class _Reordering:
    window: int
    rng: random.Random
    on_hit: OnHit
    held: list[bytes] = field(default_factory=list)

    async def pass_on(self, message: bytes) -> list[bytes]:
        self.held.append(message)
        return [self._take()] if len(self.held) > self.window else []

    def end(self) -> list[bytes]:
        return [self._take() for _ in range(len(self.held))]

    def _take(self) -> bytes:
        chosen = self.rng.randrange(len(self.held))
        if chosen:
            self.on_hit()
        return self.held.pop(chosen)

"""A gRPC proxy that damages, drops, delays or reorders the messages that a server sends, chosen by a seed.

``overfill.lab.chaos.proxy`` works on the bytes of a connection, so it forwards keepalive pings. This proxy opens
and accepts connections, so it answers pings itself.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import grpc
import grpc.aio

from overfill.rpc.channel import open_channel, server_options

Messages = AsyncIterator[bytes]

Fault = Callable[[Messages, random.Random, Callable[[], None]], Messages]
"""Returns what to forward instead of the messages of one call. It calls the function each time it injects the fault."""


class ConnectionLost(Exception):
    """Raised by a fault: the server's call ends, and the client is not notified."""


@dataclass(slots=True)
class Rule:
    """A fault, and the calls to which it applies.

    Attributes:
        method: End of the full method name, such as ``Prefill/PullKv``.
        fraction: Fraction of these calls that get the fault, chosen at random.
        remaining: Number of further calls that get the fault. None means no limit.
        hits: Number of times the fault was injected so far.
    """

    fault: Fault
    method: str
    fraction: float = 1.0
    remaining: int | None = None
    hits: int = 0

    def record_hit(self) -> None:
        self.hits += 1


class MessageProxy:
    """Forwards every RPC to ``target``, message by message, and applies the matching rules to the responses.

    Statuses, metadata, deadlines and cancellation are forwarded unchanged.
    """

    def __init__(self, target: str, seed: int = 0) -> None:
        self.rules: list[Rule] = []
        self._rng = random.Random(seed)
        self._channel: Any = open_channel(target)
        self._server = grpc.aio.server(options=server_options())
        self._server.add_generic_rpc_handlers((_AnyMethod(self),))
        self.address = ""

    async def __aenter__(self) -> MessageProxy:
        self.address = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        await self._server.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._server.stop(0)
        await self._channel.close(None)

    async def forward(self, method: str, requests: Messages, context: Any) -> None:
        """Forwards one call. On the wire every gRPC call is a stream in both directions, unary calls included."""
        call = self._channel.stream_stream(method)(
            timeout=context.time_remaining(), metadata=_without_transport(context.invocation_metadata())
        )
        sending = asyncio.ensure_future(_send(call, requests))
        try:
            await context.send_initial_metadata(await call.initial_metadata())
            async for message in self._faulty(method, _responses(call)):
                await context.write(message)
            context.set_trailing_metadata(tuple(await call.trailing_metadata() or ()))
        except ConnectionLost:
            call.cancel()
            await asyncio.Event().wait()  # until the client gives up
        except grpc.aio.AioRpcError as error:
            await context.abort(error.code(), error.details() or "", tuple(error.trailing_metadata() or ()))
        finally:
            sending.cancel()
            call.cancel()

    def _faulty(self, method: str, messages: Messages) -> Messages:
        for rule in self.rules:
            if rule.remaining == 0 or not method.endswith(rule.method) or self._rng.random() >= rule.fraction:
                continue
            if rule.remaining is not None:
                rule.remaining -= 1
            messages = rule.fault(messages, random.Random(self._rng.getrandbits(64)), rule.record_hit)
        return messages


class _AnyMethod(grpc.GenericRpcHandler):  # type: ignore[type-arg]
    def __init__(self, proxy: MessageProxy) -> None:
        self._proxy = proxy

    def service(self, handler_call_details: Any) -> Any:
        method = handler_call_details.method

        # A coroutine function, not a callable object: gRPC inspects it to recognise an asynchronous handler.
        async def handle(requests: Messages, context: Any) -> None:
            await self._proxy.forward(method, requests, context)

        return grpc.stream_stream_rpc_method_handler(handle)


async def _responses(call: Any) -> Messages:
    while (message := await call.read()) is not grpc.aio.EOF:  # type: ignore[attr-defined]
        yield message


async def _send(call: Any, requests: Messages) -> None:
    try:
        async for message in requests:
            await call.write(message)
        await call.done_writing()
    except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
        pass  # the call has ended; the reading side reports it


def _without_transport(metadata: Any) -> list[tuple[str, str | bytes]]:
    """Returns the metadata without the entries that gRPC sets itself."""
    return [(key, value) for key, value in metadata or () if not key.startswith((":", "grpc-")) and key != "user-agent"]


def _change_one(change: Callable[[bytes, random.Random], list[bytes]]) -> Fault:
    """Applies ``change`` to one of the first two messages of a call."""

    async def fault(messages: Messages, rng: random.Random, on_hit: Callable[[], None]) -> Messages:
        left = rng.randrange(2)
        async for message in messages:
            if left == 0:
                on_hit()
            for out in change(message, rng) if left == 0 else [message]:
                yield out
            left -= 1

    return fault


def _flip(message: bytes, rng: random.Random) -> list[bytes]:
    damaged = bytearray(message)
    if damaged:
        damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
    return [bytes(damaged)]


DAMAGES = (
    _change_one(_flip),
    _change_one(lambda message, rng: [message[: rng.randrange(max(1, len(message)))]]),  # cut off
    _change_one(lambda message, rng: [message, message]),
    _change_one(lambda message, rng: []),
)


def one_of(faults: Sequence[Fault]) -> Fault:
    """A random one of ``faults`` for each call."""
    return lambda messages, rng, on_hit: rng.choice(faults)(messages, rng, on_hit)


def throttle(bytes_per_second: float) -> Fault:
    """Limits the bandwidth."""

    async def fault(messages: Messages, rng: random.Random, on_hit: Callable[[], None]) -> Messages:
        async for message in messages:
            on_hit()
            await asyncio.sleep(len(message) / bytes_per_second)
            yield message

    return fault


def silence(*, server_notices: bool) -> Fault:
    """Forwards nothing. The client's call stays open; so does the server's, unless it notices a lost connection."""

    async def fault(messages: Messages, rng: random.Random, on_hit: Callable[[], None]) -> Messages:
        async for message in messages:
            on_hit()
            if server_notices:
                raise ConnectionLost
            await asyncio.Event().wait()
            yield message

    return fault


def reorder(window: int) -> Fault:
    """Holds up to ``window`` messages and forwards them in random order. Each that overtakes another is a hit."""

    async def fault(messages: Messages, rng: random.Random, on_hit: Callable[[], None]) -> Messages:
        held: list[bytes] = []

        def taken() -> bytes:
            chosen = rng.randrange(len(held))
            if chosen:
                on_hit()
            return held.pop(chosen)

        async for message in messages:
            held.append(message)
            if len(held) > window:
                yield taken()
        while held:
            yield taken()

    return fault

"""The parts that differ between the asyncio client and the blocking client: reading, channels, concurrent calls."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from typing import Any, Protocol, TypeVar

import grpc
import grpc.aio

from overfill.rpc.access import Role
from overfill.rpc.channel import open_channel, open_sync_channel
from overfill.rpc.tls import ClientTls


class Cancellable(Protocol):
    """A stream that can be cancelled; after its end, ``cancel`` does nothing."""

    def cancel(self) -> None: ...


T = TypeVar("T")
S = TypeVar("S", bound=Cancellable)


class CallCancelled(grpc.RpcError):
    """This client cancelled the call that it waits for: the request was cancelled, or the client was closed."""


class AsyncResponses:
    """Responses of one streaming gRPC call, for asyncio. Dropping the object cancels the call."""

    def __init__(self, call: Any) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None  # ``__del__`` also runs if there is no running loop
        self._loop = asyncio.get_running_loop()
        self._call = call

    def __del__(self) -> None:
        # gRPC's own tasks keep a call alive. The garbage collector may run in any thread.
        if self._loop is None:
            return
        with suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(self._call.cancel)

    async def read(self) -> Any | None:
        """The next response; None at the end of the stream. Raises grpc.RpcError."""
        response = await async_response(self._call.read())
        return None if response is grpc.aio.EOF else response  # type: ignore[attr-defined]

    def cancel(self) -> None:
        """Cancels the call."""
        self._call.cancel()


async def async_response(operation: Awaitable[T]) -> T:
    """The result of ``operation``, a gRPC call or a read from one. Raises grpc.RpcError."""
    try:
        return await operation
    except asyncio.CancelledError:
        # gRPC raises CancelledError when the call was cancelled, and when the awaiting task was.
        if _task_is_cancelled():
            raise
        raise CallCancelled from None


class Responses:
    """Responses of one streaming gRPC call, for threads."""

    def __init__(self, call: Any) -> None:
        self._call = call

    def read(self) -> Any | None:
        """The next response; None at the end of the stream. Raises grpc.RpcError."""
        return next(self._call, None)

    def cancel(self) -> None:
        """Cancels the call; any thread may do so."""
        self._call.cancel()


def response(result: T) -> T:
    """``result``: a blocking call has its response already."""
    return result


class AsyncChannels(dict[str, grpc.aio.Channel]):
    """Channels by address, opened on first use: a channel belongs to the event loop that runs when it is made."""

    def __init__(self, tls: ClientTls | None) -> None:
        super().__init__()
        self._tls = tls

    def __missing__(self, address: str) -> grpc.aio.Channel:
        channel = self[address] = open_channel(address, self._tls, role=Role.ROUTER)
        return channel

    async def close(self) -> None:
        """Cancels running calls and closes all channels."""
        for channel in self.values():
            await channel.close(None)


class Channels(dict[str, grpc.Channel]):
    """Channels by address, made at once, so that threads may share them without a lock."""

    def __init__(self, addresses: Sequence[str], tls: ClientTls | None) -> None:
        super().__init__((address, open_sync_channel(address, tls, role=Role.ROUTER)) for address in addresses)

    def close(self) -> None:
        """Cancels running calls and closes all channels."""
        for channel in self.values():
            channel.close()


async def run_as_tasks(read: Callable[[S], Awaitable[T]], streams: Sequence[S]) -> list[T]:
    """``read`` each of ``streams`` concurrently on this event loop. Return the results in order.

    The first error is raised at once, and the other streams are cancelled.
    """
    tasks = [asyncio.ensure_future(read(stream)) for stream in streams]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for stream in streams:
            stream.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def run_in_threads(read: Callable[[S], T], streams: Sequence[S]) -> list[T]:
    """``read`` each of ``streams`` concurrently, each in a thread of its own; otherwise as ``run_as_tasks``."""
    with ThreadPoolExecutor(len(streams), "overfill-samples") as pool:
        readings = [pool.submit(read, stream) for stream in streams]
        try:
            for reading in as_completed(readings):
                reading.result()
        finally:
            for stream in streams:
                stream.cancel()
    return [reading.result() for reading in readings]


def _task_is_cancelled() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0

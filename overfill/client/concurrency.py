"""The parts that differ between the asyncio client and the blocking client: reading, channels, concurrent calls."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import grpc
import grpc.aio

from overfill.rpc.channel import open_channel, open_sync_channel
from overfill.rpc.tls import ClientTls

T = TypeVar("T")


class CallCancelled(grpc.RpcError):
    """This client cancelled the call that it waits for: the request was cancelled, or the client was closed."""


class AsyncResponses:
    """Responses of one streaming gRPC call, for asyncio."""

    def __init__(self, call: Any) -> None:
        self._call = call

    async def read(self) -> Any | None:
        """The next response; None at the end of the stream. Raises grpc.RpcError."""
        response = await async_response(self._call.read())
        return None if response is grpc.aio.EOF else response  # type: ignore[attr-defined]

    def cancel(self) -> None:
        """Cancel the call."""
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
        """Cancel the call; any thread may do so."""
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
        channel = self[address] = open_channel(address, self._tls)
        return channel

    async def close(self) -> None:
        """Cancel running calls and close all channels."""
        for channel in self.values():
            await channel.close(None)


class Channels(dict[str, grpc.Channel]):
    """Channels by address, made at once, so that threads may share them without a lock."""

    def __init__(self, addresses: Sequence[str], tls: ClientTls | None) -> None:
        super().__init__((address, open_sync_channel(address, tls)) for address in addresses)

    def close(self) -> None:
        """Cancel running calls and close all channels."""
        for channel in self.values():
            channel.close()


async def run_as_tasks(calls: Sequence[Callable[[], Awaitable[T]]]) -> list[T]:
    """Run ``calls`` concurrently on this event loop, and return their results in order."""
    return list(await asyncio.gather(*[call() for call in calls]))


def run_in_threads(calls: Sequence[Callable[[], T]]) -> list[T]:
    """Run ``calls`` concurrently, each in a thread of its own, and return their results in order."""
    with ThreadPoolExecutor(len(calls), "overfill-samples") as pool:
        return list(pool.map(lambda call: call(), calls))


def _task_is_cancelled() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0

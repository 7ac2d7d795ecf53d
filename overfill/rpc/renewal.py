"""A channel that sends credentials, and opens a new connection when its certificate has been replaced.

Running RPCs stay on the old connection, which closes when the last of them has ended. New RPCs use the new connection.
Wraps only those methods of a channel that generated stubs and this package call.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

from overfill.rpc.reload import ReloadingValue

C = TypeVar("C")
Metadata = Sequence[tuple[str, str | bytes]]


class _Connection:
    """An underlying gRPC channel, with the number of RPCs that run on it."""

    def __init__(self, channel: Any, credentials: object, close: Callable[[Any], None]) -> None:
        self.channel = channel
        self.credentials = credentials
        self.callables: dict[str, Any] = {}
        self._close = close
        self._running = 0
        self._retired = False

    def began(self) -> None:
        self._running += 1

    def ended(self) -> None:
        self._running -= 1
        self._close_idle()

    def retire(self) -> None:
        """Marks the connection as old: it closes once no RPC runs on it."""
        self._retired = True
        self._close_idle()

    def _close_idle(self) -> None:
        if self._retired and not self._running:
            self._retired = False
            self._close(self.channel)


class RenewedChannel(Generic[C]):
    """Replaces a ``grpc.Channel`` or ``grpc.aio.Channel`` and renews its connection.

    Args:
        open_one: opens an underlying channel with the given credentials.
        credentials: current TLS credentials; None means a channel without TLS, which is never renewed.
        metadata: metadata added to every RPC.
        close: closes an underlying channel on which no RPC runs any more.
    """

    def __init__(
        self,
        open_one: Callable[[C | None], Any],
        credentials: ReloadingValue[C] | None,
        metadata: Metadata,
        close: Callable[[Any], None],
    ) -> None:
        self._open_one = open_one
        self._credentials = credentials
        self._metadata = metadata
        self._close_one = close
        self._connection = self._opened()

    def unary_unary(self, method: str, *args: Any, **kwargs: Any) -> Any:
        return self._callable("unary_unary", method, args, kwargs)

    def unary_stream(self, method: str, *args: Any, **kwargs: Any) -> Any:
        return self._callable("unary_stream", method, args, kwargs)

    def stream_unary(self, method: str, *args: Any, **kwargs: Any) -> Any:
        return self._callable("stream_unary", method, args, kwargs)

    def stream_stream(self, method: str, *args: Any, **kwargs: Any) -> Any:
        return self._callable("stream_stream", method, args, kwargs)

    def close(self, *args: Any) -> Any:
        """Closes the current underlying channel; older ones close with their last RPC."""
        return self._connection.channel.close(*args)

    def __enter__(self) -> RenewedChannel[C]:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    async def __aenter__(self) -> RenewedChannel[C]:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close(None)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._connection.channel, name)

    def _opened(self) -> _Connection:
        credentials = None if self._credentials is None else self._credentials.value
        return _Connection(self._open_one(credentials), credentials, self._close_one)

    def _current(self) -> _Connection:
        if self._credentials is not None and self._credentials.value is not self._connection.credentials:
            old, self._connection = self._connection, self._opened()
            old.retire()
        return self._connection

    def _callable(self, kind: str, method: str, args: Any, kwargs: Any) -> Any:
        def call(*call_args: Any, metadata: Metadata | None = None, **call_kwargs: Any) -> Any:
            connection = self._current()
            if method not in connection.callables:
                connection.callables[method] = getattr(connection.channel, kind)(method, *args, **kwargs)
            shown = (*(metadata or ()), *self._metadata) or None
            connection.began()
            try:
                started = connection.callables[method](*call_args, metadata=shown, **call_kwargs)
            except BaseException:
                connection.ended()
                raise
            _when_done(started, connection.ended)
            return started

        return call


def _when_done(started: Any, ended: Callable[[], None]) -> None:
    """Calls ``ended`` when an RPC has ended. ``started`` is an asyncio or blocking call, or a finished response."""
    if hasattr(started, "add_done_callback"):
        started.add_done_callback(lambda _: ended())
    elif hasattr(started, "add_callback"):
        if not started.add_callback(ended):
            ended()
    else:
        ended()


def close_soon(channel: Any) -> None:
    """Closes a channel; an asyncio channel is closed by a task of the running loop."""
    closing = channel.close(None) if inspect.iscoroutinefunction(channel.close) else channel.close()
    if closing is not None:
        task = asyncio.ensure_future(closing)
        _closing.add(task)
        task.add_done_callback(_closing.discard)


_closing: set[asyncio.Future[Any]] = set()

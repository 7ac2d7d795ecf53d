"""What an answer needs of its client's connection beyond ASGI: its end, and cheap reads and writes."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

from uvicorn.protocols.http.httptools_impl import RequestResponseCycle


class ClientGone(Exception):
    """The client has closed the connection."""


class _JoinedWrites:
    """Stands for a transport while ``Connection.one_write`` collects what is written."""

    def __init__(self) -> None:
        self.parts: list[bytes] = []
        self.closing = False

    def write(self, part: bytes) -> None:
        self.parts.append(part)

    def close(self) -> None:
        self.closing = True


class Connection:
    """The connection of one request. As a context manager, it cancels the block's task when the client disconnects.

    The block then ends with ClientGone. The context manager costs a fraction of what a task that waits for ASGI's
    ``http.disconnect`` costs.

    Args:
        cycle: the request and its answer in uvicorn.
        watched: connections within such a block. The protocol calls ``lost`` on them when it loses the connection.
    """

    def __init__(self, cycle: RequestResponseCycle, watched: set[Connection]) -> None:
        self._cycle = cycle
        self._watched = watched
        self._task: asyncio.Task[object] | None = None
        self._cancelling = 0  # cancellations of the task from before the block
        self._lost = False

    def __enter__(self) -> None:
        if self._cycle.transport.is_closing():
            raise ClientGone
        self._cycle.flow.resume_reading()  # uvicorn may have paused it for a long body, and then sees no disconnect
        self._task = asyncio.current_task()
        assert self._task is not None
        self._cancelling = self._task.cancelling()
        self._watched.add(self)

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._watched.discard(self)
        if not self._lost:
            return
        assert self._task is not None
        # A task that is also cancelled for another reason, such as a shutdown, stays cancelled.
        if self._task.uncancel() <= self._cancelling and exc_type is asyncio.CancelledError:
            raise ClientGone from exc

    def lost(self) -> None:
        """Cancels the block. The event loop calls it between two steps of the block's task."""
        assert self._task is not None
        self._lost = True
        self._cycle.disconnected = True  # uvicorn tells only the last of several pipelined requests
        self._task.cancel()

    def take_body(self) -> bytes | None:
        """Returns the request's body if all of it has arrived; else None, and only ASGI's ``receive`` returns it."""
        cycle = self._cycle
        if cycle.more_body or cycle.disconnected:
            return None
        body, cycle.body = cycle.body, bytearray()
        return bytes(body)

    @contextmanager
    def one_write(self) -> Iterator[None]:
        """Joins what ASGI's ``send`` writes within the block, such as a head and an event, into one write."""
        cycle, transport = self._cycle, self._cycle.transport
        joined = _JoinedWrites()
        cycle.transport = joined  # type: ignore[assignment]
        try:
            yield
        finally:
            cycle.transport = transport
            transport.write(b"".join(joined.parts))
            if joined.closing:
                transport.close()

    def write_at_once(self, part: bytes) -> bool:
        """Writes a part of a body that has begun, past the layers of ASGI, which cost as much as the rest of the write.

        Returns False if only ASGI's ``send`` may write it: before the head, or when the client reads slowly or is gone.
        """
        cycle = self._cycle
        if cycle.flow.write_paused or cycle.disconnected or not cycle.chunked_encoding:
            return False
        cycle.transport.write(b"%x\r\n%b\r\n" % (len(part), part))
        return True

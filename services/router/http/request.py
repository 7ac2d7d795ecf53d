"""One HTTP request and its response, as the routes see them. Knows no sockets: the connection reads and writes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable
from email.utils import formatdate
from functools import cache
from http import HTTPStatus
from typing import Any, Protocol
from urllib.parse import unquote

from overfill.api.openai.errors import too_large
from overfill.rpc.access import Role
from services.router.http.state import ServerState

Headers = Iterable[tuple[bytes, bytes]]


class Channel(Protocol):
    """The connection of a request."""

    @property
    def roles(self) -> frozenset[Role] | None: ...

    def write(self, data: bytes) -> None: ...

    @property
    def writes_wait(self) -> bool: ...

    async def writable(self) -> None: ...


class Request:
    """A request, of which the body may still arrive, and the response to it.

    Attributes:
        method: the HTTP method.
        path: decoded path, without the query.
        headers: values by name in lower case; the values of one name are joined by commas.
        keep_alive: True if the connection stays open after the response.
        key: id of the API key that pays for the request's bytes; empty without one.
        answer_id: id of the answer; empty before it has one.
        status: status of the response; None before it.
        answered: True once the whole response has been written.
    """

    __slots__ = (
        "_body", "_channel", "_chunked", "_error", "_head", "_modern", "_received", "_state", "_waiter", "answer_id",
        "answered", "headers", "keep_alive", "key", "method", "path", "status",
    )  # fmt: skip

    def __init__(
        self,
        channel: Channel,
        state: ServerState[Any, Any],
        method: str,
        path: bytes,
        headers: dict[bytes, bytes],
        *,
        modern: bool,
        keep_alive: bool,
    ) -> None:
        self.method = method
        self.path = unquote(path.decode("latin-1")) if b"%" in path else path.decode("latin-1")
        self.headers = headers
        self.keep_alive = keep_alive
        self.key = ""
        self.answer_id = ""
        self.status: int | None = None
        self.answered = False
        self._channel = channel
        self._state = state
        self._modern = modern  # HTTP/1.1, else 1.0
        self._body: bytes | bytearray | None = b""  # what has arrived of it; None once it is unwanted
        self._received = False
        self._error: Exception | None = None  # why the rest of the body does not come
        self._waiter: asyncio.Future[None] | None = None
        self._head = b""  # of a response that has not been written yet
        self._chunked = False

    @property
    def roles(self) -> frozenset[Role] | None:
        """Roles in the client's certificate; None if the listener requires none."""
        return self._channel.roles

    def header(self, name: bytes) -> str:
        """Returns the value of a header; empty without it."""
        return self.headers.get(name, b"").decode("latin-1")

    # The body, for the connection

    def add(self, data: bytes) -> bool:
        """Adds a part of the body. Returns False if the body is unwanted."""
        body = self._body
        if body is None:
            return False
        if len(body) + len(data) > self._state.max_body:
            self.fail(too_large(self._state.max_body))
            return False
        if not body:
            self._body = data
        elif isinstance(body, bytearray):
            body += data
        else:  # a list of small parts would need many times their size
            self._body = bytearray(body) + data
        return True

    def complete(self) -> None:
        """Marks the end of the body."""
        self._received = True
        self._wake()

    def fail(self, error: Exception) -> None:
        """Makes ``body`` raise ``error``, unless the body has been read."""
        if self._body is not None:
            self._body, self._error = None, error
            self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    # The body, for routes

    async def body(self) -> bytes:
        """Waits for the body and returns it.

        Raises:
            ApiError: it is larger than the limit, too slow, or not valid HTTP.
            Overloaded: the bodies in receipt hold too many bytes.
        """
        if not self._received and self._error is None:
            await self._receive()
        if self._error is not None:
            try:
                raise self._error
            finally:
                self._error = None  # or the traceback, which refers to this request, would be part of a circle
        body, self._body = self._body or b"", None
        return bytes(body)

    async def _receive(self) -> None:
        budget, limit = self._state.budget, self._state.max_body
        announced = int(self.headers.get(b"content-length", limit))  # a chunked body may become as large as the limit
        try:
            if announced > limit:
                raise too_large(limit)
            budget.take(self.key, announced)
        except Exception:
            self.discard()
            raise
        try:
            if not self._body and self._modern and self.header(b"expect").lower() == "100-continue":
                self._channel.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        finally:
            budget.release(self.key, announced)

    def discard(self) -> None:
        """Drops what has arrived of the body, and what will arrive."""
        self._body = None

    # The response

    def respond(self, status: int, body: bytes, headers: Headers = ()) -> None:
        """Writes the whole response."""
        head = self._start(status, headers, b"content-length: %d\r\n" % len(body))
        self.answered = True
        self._channel.write(head if self.method == "HEAD" else head + body)

    def begin(self, status: int, headers: Headers) -> None:
        """Begins a response of unknown length. Its head leaves with the first ``write``."""
        self._chunked = self._modern
        self.keep_alive = self.keep_alive and self._modern
        self._head = self._start(status, headers, b"transfer-encoding: chunked\r\n" if self._modern else b"")

    def write(self, part: bytes, *, last: bool = False) -> None:
        """Writes a non-empty part of a response that has begun, or its last part."""
        if self._chunked:
            part = b"%b%x\r\n%b\r\n%b" % (self._head, len(part), part, b"0\r\n\r\n" if last else b"")
        else:
            part = self._head + part
        self._head = b""
        self.answered = last
        self._channel.write(part)

    @property
    def writes_wait(self) -> bool:
        """True while the client reads more slowly than the server writes. Then wait with ``writable``."""
        return self._channel.writes_wait

    async def writable(self) -> None:
        """Waits until the client has read most of what was written."""
        await self._channel.writable()

    def _start(self, status: int, headers: Headers, framing: bytes) -> bytes:
        self.status = status
        if self._state.draining:
            self.keep_alive = False
        if not self.keep_alive:
            framing += b"connection: close\r\n"
        elif not self._modern:
            framing += b"connection: keep-alive\r\n"
        return response_head(status, headers, framing)


def response_head(status: int, headers: Headers, framing: bytes) -> bytes:
    """Returns the head of a response. ``framing`` are complete lines that say how long it is."""
    lines = b"".join([b"%b: %b\r\n" % pair for pair in headers])
    return b"%b%b%b%b\r\n" % (_status_line(status), _date(), lines, framing)


@cache
def _status_line(status: int) -> bytes:
    return f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\n".encode()


def _once_a_second(make: Callable[[int], bytes]) -> Callable[[], bytes]:
    second, value = 0, b""

    def current() -> bytes:
        nonlocal second, value
        now = int(time.time())
        if now != second:
            second, value = now, make(now)
        return value

    return current


_date = _once_a_second(lambda now: f"date: {formatdate(now, usegmt=True)}\r\n".encode())

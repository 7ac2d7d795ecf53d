"""One HTTP/1.1 connection, from accept to close: the TLS handshake, the framing of requests, and every limit.

The connection knows no routes and no JSON. It hands requests to the application, one after the other, and cancels the
application's task when the client disconnects.
"""

from __future__ import annotations

import asyncio
import logging
import math
import socket
import ssl
from collections import deque
from contextlib import suppress
from contextvars import Context
from typing import Any, cast

import httptools

from overfill.api.openai.answers import encode
from overfill.api.openai.errors import ApiError, too_many_connections, too_slow
from overfill.rpc.access import Role, roles_of
from overfill.rpc.tls import names_of
from services.router.http.head import MAX_HEAD, RequestHead, too_large_head
from services.router.http.request import Request, response_head
from services.router.http.state import SHORT, ServerState
from services.router.limits import STALLED_TIMEOUT

logger = logging.getLogger(__name__)

HEAD_TIMEOUT = 10.0
"""Seconds for the head of a request to arrive, counted from its first byte. For the first request of a connection they
count from accept, and include the TLS handshake."""

BODY_TIMEOUT = 30.0
"""Seconds for the body of a request to arrive, counted from the end of its head, whether it is answered or not."""

IDLE_TIMEOUT = 75.0
"""Seconds that a connection may stay open without a request."""

LINGER_TIMEOUT = 2.0
"""Seconds for which the server reads on after the error that ends a connection.

If the server closed the socket while the client sends, the client would lose the answer (RFC 9112, section 9.6).
"""

MIN_READ = 48 << 10
"""Minimum number of bytes that a client reads in ``STALLED_TIMEOUT`` seconds while an answer waits for it."""

MAX_REST = 64 << 20
"""Maximum number of bytes that the server discards: of a body that it has answered early, or after an error.

The server reads them, because many clients read no answer while they send.
"""

MIN_PART = 1 << 10
"""Bytes that a smaller part of a body, such as a chunk, counts as: it takes as much time as a part of this size."""

DISCARD_RATE = 64e6
"""Bytes per second that all connections together discard, and that each may send in small parts.

Without this limit, refused bodies, or bodies that come byte by byte, would keep the server busy.
"""

MAX_PIPELINED = 8
"""Maximum number of requests that wait for an earlier answer. With more, the connection closes after their answers."""


class Connection(asyncio.Protocol):
    """Serves the requests of one connection. The server calls ``check_time`` about twice a second.

    Attributes:
        roles: roles in the client's certificate; None if the listener requires none.
    """

    __slots__ = (
        "_current", "_deadline", "_head", "_idle", "_lingers", "_lost", "_parser",
        "_partial", "_pending", "_queue", "_receiving", "_refused", "_rest", "_shaking_hands",
        "_stalled_until", "_state", "_task", "_transport", "_unfinished", "_unpaced", "_unread", "_writable",
        "roles",
    )  # fmt: skip

    def __init__(self, state: ServerState[Connection, Request]) -> None:
        self.roles: frozenset[Role] | None = None
        self._state = state
        self._transport: asyncio.Transport
        self._shaking_hands = state.tls is not None
        self._deadline = state.now() + HEAD_TIMEOUT
        self._stalled_until = math.inf  # deadline of a client that does not read
        self._unread = 0  # number of bytes that it had not read when that deadline was set
        self._idle = False  # no byte has arrived since the last answer
        self._lingers = False  # the error that ends the connection has been written
        self._lost = False
        self._parser: Any = httptools.HttpRequestParser(self)
        # The head that arrives
        self._partial = False
        self._head = RequestHead()  # or behind it, the trailers of the body
        self._unfinished = 0  # bytes since the last head or part of a body that the parser has completed
        # Requests whose head has arrived
        self._receiving: Request | None = None  # the one whose body arrives
        self._rest = 0  # number of bytes discarded, of that body or after an error
        self._unpaced = 0  # number of bytes for which ``DISCARD_RATE`` has not been kept yet
        self._current: Request | None = None  # the one that is answered
        self._task: asyncio.Task[None] | None = None  # answers it; before the first request, does the TLS handshake
        self._queue: deque[Request] = deque()  # those that wait for its answer
        # What arrived after them
        self._pending = b""
        self._refused: ApiError | None = None  # answer to something that cannot be parsed; the last of the connection
        self._writable: asyncio.Future[None] | None = None

    # From accept to close

    def admit(self) -> bool:
        """Counts the connection. Returns False if there are too many, and none gives way."""
        state = self._state
        state.open.add(self)
        state.none_open.clear()
        if len(state.open) > state.max_connections:
            if not state.free and not state.receiving:
                return False
            victim = next(iter(state.free or state.receiving))
            victim._close()  # tells the client, with TLS
            victim._abort()  # does not wait for its answer to that
        self._offer_place()
        return True

    def accept(self, accepted: socket.socket, context: ssl.SSLContext) -> None:
        """Begins the TLS handshake on a socket, or closes it if there are too many connections."""
        if not self.admit():
            self._lose()
            accepted.close()
            return
        self._task = asyncio.get_running_loop().create_task(self._shake_hands(accepted, context))
        # Another connection may take its place before the task's first step, and then the task runs nothing.
        self._task.add_done_callback(lambda task: self._end_handshake(accepted))

    async def _shake_hands(self, accepted: socket.socket, context: ssl.SSLContext) -> None:
        loop = asyncio.get_running_loop()
        with suppress(OSError):  # it failed, or took too long
            await loop.connect_accepted_socket(lambda: self, accepted, ssl=context, ssl_handshake_timeout=HEAD_TIMEOUT)

    def _end_handshake(self, accepted: socket.socket) -> None:
        if self._shaking_hands:  # it was not completed
            self._lose()
            accepted.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begins to read: after accept, or after the TLS handshake."""
        self._transport = cast("asyncio.Transport", transport)  # not a subclass of it on uvloop, which Ray uses
        # asyncio sets it only on sockets that it creates. Without it, an event waits 40 ms for an acknowledgement.
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        secured = transport.get_extra_info("ssl_object")
        if secured is None:
            if not self.admit():
                self._end(too_many_connections())
                self._close()
        elif secured.context.verify_mode == ssl.CERT_REQUIRED:
            self.roles = roles_of(names_of(secured.getpeercert()))
        if self._shaking_hands:
            self._task = None
            self._shaking_hands = False

    def connection_lost(self, error: Exception | None) -> None:
        """Cancels the answer."""
        self._lose()
        if self._task is not None:
            self._task.cancel()
        self.resume_writing()

    def check_time(self, now: float) -> None:
        """Ends the connection if the client has been too slow."""
        if now > self._stalled_until:
            if self._num_unread() > self._unread - MIN_READ:
                self._abort()
            else:
                self._await_reader()
        elif now <= self._deadline:
            return
        elif self._shaking_hands:
            self._abort()
        elif self._receiving is not None and self._receiving is self._current:
            self._refuse(too_slow())
        elif self._receiving is not None or self._idle or self._lingers:
            self._close()
        else:
            self._end(ApiError(408, "the head of the request did not arrive in time", code="request_timeout"))

    def drain(self) -> None:
        """Closes the connection if it is idle. Others close after their answer, because the server drains."""
        if self._idle or self._lingers:
            self._close()

    def stop(self) -> asyncio.Task[None] | None:
        """Ends the connection at once. Returns the task that still ends an answer."""
        if self._task is not None:
            self._task.cancel()
        self._abort()
        return self._task

    def _close(self) -> None:
        """Closes once the client has what was written."""
        self._keep_place()
        if not self._shaking_hands:
            self._deadline = math.inf
            self._await_reader()
            self._transport.close()

    def _linger(self) -> None:
        """Closes once the client has what was written, and has stopped sending."""
        with suppress(OSError):  # the client has disconnected
            if self._transport.can_write_eof():
                self._transport.write_eof()
        self._lingers = True
        self._deadline = self._state.now() + LINGER_TIMEOUT

    def _abort(self) -> None:
        if not self._shaking_hands:
            self._transport.abort()
        elif self._task is not None:
            self._task.cancel()

    def _lose(self) -> None:
        self._lost = True
        self._state.open.discard(self)
        if not self._state.open:
            self._state.none_open.set()
        self._keep_place()
        # They refer to the connection; without this, it would stay in memory until a garbage collection.
        self._parser = self._refused = None

    # Reading

    def data_received(self, data: bytes) -> None:
        """Parses what belongs to the current request or to the next one, and keeps what came too early."""
        if self._refused is not None:
            self._discard(len(data))
        elif self._current is None or self._receiving is self._current:
            self._parse(data)
        else:
            self._pending += data
            if len(self._pending) > MAX_HEAD:
                self._abort()  # to pause reading instead would hide a disconnect
        if self._unpaced > SHORT:
            self._pace()

    def _discard(self, size: int) -> None:
        self._rest += size
        self._unpaced += size
        if self._rest > MAX_REST:
            self._close()

    def _pace(self) -> None:
        """Reads on when ``DISCARD_RATE`` allows it."""
        state, transport = self._state, self._transport
        now = state.now()
        until = (max(now, state.discarded_until) if self._rest else now) + self._unpaced / DISCARD_RATE
        if self._rest:  # a body that is wanted does not wait for those that are not
            state.discarded_until = until
        self._unpaced = 0
        transport.pause_reading()
        asyncio.get_running_loop().call_later(until - now, transport.resume_reading)

    def _parse_pending(self) -> None:
        data, self._pending = self._pending, b""
        if data:
            self._parse(data)

    def _parse(self, data: bytes) -> None:
        if self._idle:
            self._await_head()
        self._unfinished += len(data)
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            self._parse_behind_upgrade(data[upgrade.args[0] :])
        except (httptools.HttpParserError, httptools.HttpParserCallbackError) as error:
            cause = error.__context__  # what a method raised that the parser has called
            if isinstance(cause, ApiError):
                self._refuse(cause.with_traceback(None))  # or the traceback would refer to the connection
            else:
                self._refuse(ApiError(400, "the request is not valid HTTP"))
        else:
            if self._unfinished > MAX_HEAD:
                self._refuse(too_large_head())

    def _parse_behind_upgrade(self, data: bytes) -> None:
        """Parses what follows a head with ``Upgrade``. This server ignores that header (RFC 9110, section 7.8).

        httptools takes such a head for the end of HTTP, and skips the body. So a new parser reads the body. It first
        gets a head that has nothing but the length of the body.
        """
        self._parser = httptools.HttpRequestParser(self)
        if self._receiving is not None:
            headers = self._receiving.headers
            name = b"transfer-encoding" if b"transfer-encoding" in headers else b"content-length"
            self._parser.feed_data(b"POST / HTTP/1.1\r\n%b: %b\r\n\r\n" % (name, headers[name]))
        if data:
            self._parse(data)

    # Reading: called by the parser, in this order. During a body, the first four see trailers, or the head of
    # ``_parse_behind_upgrade``, which nothing may trust.

    def on_message_begin(self) -> None:
        if self._receiving is not None:
            return
        if self._transport.is_closing():
            raise ValueError("the answer before was the last one")
        if self._idle:  # the request before was answered before its end
            self._await_head()
        self._partial = True
        self._head = RequestHead()
        self._unfinished = 0
        if len(self._queue) >= MAX_PIPELINED:
            raise ApiError(400, f"more than {MAX_PIPELINED} requests wait for an earlier answer")

    def on_url(self, target: bytes) -> None:
        if self._receiving is None:
            self._head.add_target(target)

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._receiving is None:
            self._head.add_header(name, value)
        else:
            self._head.add_trailer(name, value)

    def on_headers_complete(self) -> None:
        self._unfinished = 0
        if self._receiving is not None:
            self._head = RequestHead()
            return
        self._partial = False
        parser, state, head = self._parser, self._state, self._head
        method, version = parser.get_method().decode("ascii"), parser.get_http_version()
        path = head.path(method, version)
        self._head = RequestHead()
        request = Request(
            self, state, method, path, head.headers, modern=version == "1.1", keep_alive=parser.should_keep_alive()
        )
        self._receiving = request
        self._rest = 0
        if self._current is None:
            self._answer(request)
        else:
            self._queue.append(request)

    def on_body(self, data: bytes) -> None:
        assert self._receiving is not None
        self._unfinished = 0
        if not self._receiving.add(data):
            self._discard(max(len(data), MIN_PART))
        elif len(data) < MIN_PART:
            self._unpaced += MIN_PART

    def on_message_complete(self) -> None:
        request = self._receiving
        assert request is not None
        if self._parser.should_upgrade() and _has_body(request.headers):
            return
        self._receiving = None
        self._unfinished = 0
        if self._unpaced <= SHORT:  # short bodies are never paced
            self._unpaced = 0
        request.complete()
        if request is self._current:
            self._deadline = math.inf
            self._keep_place()
        elif self._current is None:  # it was answered before its end
            self._go_on(request)

    # Answering

    def _answer(self, request: Request) -> None:
        self._keep_place()
        self._current = request
        self._deadline = math.inf
        if self._receiving is request:
            self._deadline = self._state.now() + BODY_TIMEOUT
            self._state.receiving[self] = None
        # In the connection's context, a request would see the ids of an earlier one.
        self._task = asyncio.get_running_loop().create_task(self._run(request), context=Context())

    async def _run(self, request: Request) -> None:
        try:
            await self._state.app(request)
            await self.writable()  # or answers that the client does not read would pile up
        except asyncio.CancelledError:
            if not self._lost:
                raise  # the server stops
        except Exception:
            logger.exception("the answer to %s %s failed", request.method, request.path)
        finally:
            request.discard()
            self._current = self._task = None
            if not request.answered:
                self._abort()
        if not request.answered or self._lost:
            return
        if self._receiving is request:
            self._keep_place()
            self._offer_place()  # discards the rest of the body, and goes on at its end
        else:
            self._go_on(request)

    def _go_on(self, last: Request) -> None:
        """Goes on to what follows ``last``, which has arrived and is answered."""
        if not last.keep_alive:
            if self._refused is None:
                self._close()
            else:
                self._linger()
        elif self._queue:
            self._answer(self._queue.popleft())
            if self._receiving is self._current:
                self._parse_pending()
        elif self._refused is not None:
            self._end(self._refused)
        elif self._pending:
            self._await_head()
            self._parse_pending()
        elif self._partial:
            self._await_head()
        elif self._state.draining:
            self._close()
        else:
            self._idle = True
            self._offer_place()
            self._deadline = self._state.now() + IDLE_TIMEOUT

    def _await_head(self) -> None:
        self._idle = False
        self._offer_place()
        self._deadline = self._state.now() + HEAD_TIMEOUT

    def _keep_place(self) -> None:
        """Keeps the place of this connection, whose request has arrived."""
        self._state.free.pop(self, None)
        self._state.receiving.pop(self, None)

    def _offer_place(self) -> None:
        """Lets a new connection take the place of this one, which has no request, unless the client still reads."""
        if self._shaking_hands or not self._num_unread():
            self._state.free.setdefault(self)

    def _refuse(self, error: ApiError) -> None:
        """Answers the requests that arrived before the fault, writes ``error``, and closes."""
        self._refused = error
        failed, self._receiving = self._receiving, None
        if self._current is None:
            if failed is None:
                self._end(error)
            else:
                self._linger()
        elif failed is self._current:
            failed.keep_alive = False
            failed.fail(error)
            self._deadline = math.inf
        elif failed is not None:
            self._queue.pop()

    def _end(self, error: ApiError) -> None:
        """Writes ``error`` as the last response of the connection."""
        self._refused = error
        if not self._transport.is_closing():
            content, headers = self._head.refusal(error)
            body = encode(content)
            framing = b"content-length: %d\r\nconnection: close\r\n" % len(body)
            headers.append((b"content-type", b"application/json"))
            self._transport.write(response_head(error.status, headers, framing) + body)
            self._linger()

    # Writing

    def write(self, data: bytes) -> None:
        """Writes ``data``, unless the client has disconnected."""
        if not self._lost:
            self._transport.write(data)

    @property
    def writes_wait(self) -> bool:
        """True while the client reads more slowly than the server writes."""
        return self._writable is not None

    async def writable(self) -> None:
        """Waits until ``writes_wait`` is False."""
        if self._writable is not None:
            await asyncio.shield(self._writable)

    def pause_writing(self) -> None:
        """Begins a wait for the client to read."""
        self._writable = asyncio.get_running_loop().create_future()
        self._await_reader()

    def resume_writing(self) -> None:
        """Ends the wait."""
        if not self._transport.is_closing():
            self._stalled_until = math.inf
        if self._writable is not None:
            self._writable.set_result(None)
            self._writable = None

    def _await_reader(self) -> None:
        self._stalled_until = self._state.now() + STALLED_TIMEOUT
        self._unread = self._num_unread()

    def _num_unread(self) -> int:
        """Returns the number of bytes that were written, and that the client has not made room for."""
        return self._transport.get_write_buffer_size()


def _has_body(headers: dict[bytes, bytes]) -> bool:
    return b"transfer-encoding" in headers or int(headers.get(b"content-length", b"0")) > 0

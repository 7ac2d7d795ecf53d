"""The HTTP server: refuses to listen in the clear, adds TLS, and limits connections in ways that uvicorn does not."""

from __future__ import annotations

import asyncio
import contextlib
import math
import socket
import ssl
from collections.abc import Iterator
from typing import Any

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from overfill.api.openai.answers import encode
from overfill.api.openai.errors import ApiError, too_many_connections
from overfill.errors import Unavailable
from overfill.rpc.access import Role, roles_of
from overfill.rpc.addresses import is_loopback, socket_host
from overfill.rpc.reload import ReloadingValue
from overfill.rpc.tls import ServerTls, TlsError, names_of
from services.router.http.connection import Connection
from services.router.limits import STALLED_TIMEOUT

HEAD_TIMEOUT = 10.0
"""Seconds for the head of a request to arrive, counted from the connection or from its first byte."""

MAX_HEAD = 64 << 10
"""Maximum size of a request's head in bytes."""

IDLE_TIMEOUT = 75
"""Seconds that a connection may stay open without a request."""

REST_TIMEOUT = 30.0
"""Seconds for the rest of a body after its answer. The server reads it, as a client reads no answer while it sends."""

MAX_REST = 64 << 20
"""Maximum number of bytes of such a rest that the server reads and discards."""

MAX_PIPELINED = 8
"""Requests that may wait behind an answer. With more, the server stops reading the connection until the answer ends."""

_BACKLOG = 2048


class HttpServer:
    """Serves ``app`` in the running event loop.

    Args:
        max_connections: maximum number of connections. The server answers further ones with an error and closes them.
        tls: certificate and key. None means no TLS, which is allowed on loopback only.
        client_certificates: True to require client certificates signed by ``tls.client_ca``.
        share_port: let other processes listen on the same port; the kernel divides the connections among them.
        stop_grace: seconds that ``stop`` gives running answers.
    """

    def __init__(
        self,
        app: ASGIApp,
        max_connections: int,
        tls: ServerTls | None,
        *,
        client_certificates: bool,
        share_port: bool = False,
        stop_grace: float = 1.0,
    ) -> None:
        self._tls = tls
        self._share_port = share_port

        class Protocol(_LimitedProtocol):
            pass

        Protocol.max_connections = max_connections
        self._protocol = Protocol

        config = uvicorn.Config(
            app,
            loop="asyncio",
            http=self._protocol,
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=IDLE_TIMEOUT,
            timeout_graceful_shutdown=math.ceil(stop_grace),
            backlog=_BACKLOG,
            reset_contextvars=True,  # otherwise a request may get the ids of an earlier one on its connection
        )
        config.load()
        if tls is not None:
            config.ssl = _renewing(tls.contexts(client_certificates))
        self._server = _Server(config)
        self._serving: asyncio.Task[None] | None = None

    async def start(self, host: str, port: int) -> str:
        """Listens, and returns the ``host:port`` in use. Port 0 means any free port.

        Raises:
            Unavailable: the address is in use or does not belong to this machine.
            TlsError: the host is open to other machines and there is no TLS.
        """
        if self._tls is None and not is_loopback(host):
            raise TlsError(f"refusing to serve HTTP on {host} in the clear: configure a TLS certificate and key")
        bare, family = socket_host(host)
        try:
            listener = socket.create_server((bare, port), family=family, backlog=_BACKLOG, reuse_port=self._share_port)
        except OSError as error:
            raise Unavailable(f"cannot serve HTTP on {host}:{port}: {error.strerror}") from error
        self._serving = asyncio.create_task(self._server.serve(sockets=[listener]))
        while not self._server.started:  # uvicorn has no event for this; it needs one turn of the loop
            if self._serving.done():
                self._serving.result()
                raise Unavailable(f"the HTTP server on {host}:{port} did not start")
            await asyncio.sleep(0)
        return f"{host}:{listener.getsockname()[1]}"

    def drain(self) -> None:
        """Closes each connection when its answer is complete. New connections are accepted, for one answer each."""
        self._protocol.draining = True
        for connection in list(self._server.server_state.connections):
            connection.shutdown()

    async def stop(self) -> None:
        """Accepts no new connections, and closes each open one when its answer is complete."""
        if self._serving is not None:
            self._server.should_exit = True
            await self._serving


class _Server(uvicorn.Server):
    """Leaves signals to the process, which has its own handlers."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class _LimitedProtocol(HttpToolsProtocol):
    """One connection. Cuts off slow or oversized heads, stalled readers, and connections beyond the maximum."""

    max_connections = 0
    draining = False
    _head_timer: asyncio.TimerHandle | None = None
    _stall_timer: asyncio.TimerHandle | None = None
    _head_bytes = 0  # bytes of the head that the parser has seen
    _unfinished_bytes = 0  # bytes received of an incomplete head
    _in_body = False  # True between a head and the end of its request
    _rest_timer: asyncio.TimerHandle | None = None
    _rest_bytes = 0
    _roles: frozenset[Role] | None = None  # roles of the client's certificate, if one is required

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._watched: set[Connection] = set()  # at most one, as requests are answered one after the other
        # asyncio sets it only on sockets that it creates. Without it, an event waits 40 ms for an acknowledgement.
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        secured = transport.get_extra_info("ssl_object")
        if secured is not None and secured.context.verify_mode == ssl.CERT_REQUIRED:
            self._roles = roles_of(names_of(secured.getpeercert()))
        self._await_head()
        if len(self.connections) > self.max_connections:
            self._reject(too_many_connections())

    def connection_lost(self, exc: Exception | None) -> None:
        self._head_done()
        self._rest_done()
        self._reading_again()
        super().connection_lost(exc)
        for connection in self._watched:
            connection.lost()

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        answered = self.cycle is None or self.cycle.response_complete
        if answered and self._in_body:
            self._drop(len(data))
        elif answered and self._head_timer is None:
            self._await_head()
        in_head = self._head_timer is not None
        super().data_received(data)
        if in_head and self._head_timer is not None:  # the head is still incomplete, so all bytes belong to it
            self._unfinished_bytes += len(data)
            if self._unfinished_bytes > MAX_HEAD:
                self._reject(_head_too_large())

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self.scope["overfill.roles"] = self._roles  # type: ignore[typeddict-unknown-key]
        if self._head_timer is None:  # a pipelined head: the previous request is still being answered
            self._await_head()

    def on_url(self, url: bytes) -> None:
        super().on_url(url)
        self._count(len(url))

    def on_header(self, name: bytes, value: bytes) -> None:
        super().on_header(name, value)
        self._count(len(name) + len(value) + 4)

    def on_headers_complete(self) -> None:
        self._head_done()
        self._head_bytes = 0
        self._in_body = True
        super().on_headers_complete()
        if len(self.pipeline) < MAX_PIPELINED:
            self.flow.resume_reading()  # uvicorn pauses it for a waiting request, and then sees no disconnect
        assert self.cycle is not None
        if self.draining:
            self.cycle.keep_alive = False
        self.scope["overfill.connection"] = Connection(self.cycle, self._watched)  # type: ignore[typeddict-unknown-key]

    def on_message_complete(self) -> None:
        self._in_body = False
        self._rest_done()
        super().on_message_complete()

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._stall_timer is None:
            self._stall_timer = self.loop.call_later(STALLED_TIMEOUT, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._reading_again()

    def send_400_response(self, msg: str) -> None:
        """Replaces uvicorn's answer to invalid HTTP, and to errors that the parser's callbacks raise."""
        too_large = self._head_bytes > MAX_HEAD
        self._reject(_head_too_large() if too_large else ApiError(400, "the request is not valid HTTP"))

    def _count(self, size: int) -> None:
        self._head_bytes += size
        if self._head_bytes > MAX_HEAD:
            raise ValueError("the head is too large")

    def _await_head(self) -> None:
        self._head_bytes = self._unfinished_bytes = 0
        self._head_timer = self.loop.call_later(HEAD_TIMEOUT, self._head_missing)

    def _head_done(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _head_missing(self) -> None:
        self._head_timer = None
        self._reject(ApiError(408, "the head of the request did not arrive in time"))

    def _drop(self, size: int) -> None:
        if self._rest_timer is None:
            self._rest_timer = self.loop.call_later(REST_TIMEOUT, self.transport.close)
        self._rest_bytes += size
        if self._rest_bytes > MAX_REST:
            self.transport.close()

    def _rest_done(self) -> None:
        self._rest_bytes = 0
        if self._rest_timer is not None:
            self._rest_timer.cancel()
            self._rest_timer = None

    def _reading_again(self) -> None:
        if self._stall_timer is not None:
            self._stall_timer.cancel()
            self._stall_timer = None

    def _reject(self, error: ApiError) -> None:
        if self.transport.is_closing():
            return
        cycle = self.cycle
        if cycle is not None and cycle.response_started and not cycle.response_complete:
            # The error must not be written into an answer that has started.
            self.transport.close()
            return
        body = encode(error.body)
        head = (
            f"HTTP/1.1 {error.status} {_PHRASES[error.status]}\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
        self.transport.close()


def _head_too_large() -> ApiError:
    return ApiError(431, f"the head of the request is larger than {MAX_HEAD} bytes")


_PHRASES = {
    400: "Bad Request",
    408: "Request Timeout",
    431: "Request Header Fields Too Large",
    503: "Service Unavailable",
}


def _renewing(contexts: ReloadingValue[ssl.SSLContext]) -> ssl.SSLContext:
    """Returns a context that uses the current certificate in every handshake."""
    first = contexts.value

    def choose(connection: ssl.SSLSocket | ssl.SSLObject, name: str | None, context: ssl.SSLContext) -> None:
        connection.context = contexts.value

    first.sni_callback = choose
    return first

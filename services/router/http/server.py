"""The HTTP server: listens, refuses to do so in the clear, and starts, times, drains and stops its connections."""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress

from overfill.errors import Unavailable
from overfill.rpc.addresses import is_loopback, socket_host
from overfill.rpc.reload import ReloadingValue
from overfill.rpc.tls import ServerTls, TlsError
from services.router.http.connection import Connection
from services.router.http.request import Request
from services.router.http.state import ByteBudget, ServerState

logger = logging.getLogger(__name__)

_BACKLOG = 2048

_ACCEPTED_AT_ONCE = 32
"""Maximum number of connections that the event loop accepts in a row. Each has a file open before it can be refused."""

_ROUND = 0.5
"""Seconds between two looks at the clocks of all connections. One timer for all costs less than one for each."""


class HttpServer:
    """Serves ``app`` in the running event loop.

    Args:
        app: answers a request. The server cancels it when the client disconnects.
        max_connections: maximum number of connections, counted from accept on. For a further one, the server closes the
            connection that has had no request for longest; if all have one, that whose request has been arriving for
            longest. If all requests have arrived, it answers the further one with an error and closes it, or with TLS
            closes it at once.
        max_body: maximum size of a request's body in bytes.
        max_bodies: maximum size of all bodies in receipt together, in bytes. One API key may hold a quarter of it.
        tls: certificate and key. None means no TLS, which is allowed on loopback only.
        client_certificates: True to require client certificates signed by ``tls.client_ca``.
        share_port: let other processes listen on the same port; the kernel divides the connections among them.
        stop_grace: seconds that ``stop`` gives running answers.
    """

    def __init__(
        self,
        app: Callable[[Request], Awaitable[None]],
        max_connections: int,
        tls: ServerTls | None,
        *,
        client_certificates: bool,
        max_body: int = 4 << 20,
        max_bodies: int = 128 << 20,
        share_port: bool = False,
        stop_grace: float = 1.0,
    ) -> None:
        self._share_port = share_port
        self._stop_grace = stop_grace
        self._state: ServerState[Connection, Request] = ServerState(
            app,
            time.monotonic,
            max_connections,
            max_body,
            ByteBudget(max_bodies, max(max_body, max_bodies // 4)),
            None if tls is None else tls.contexts(client_certificates),
        )
        self._listener: socket.socket | None = None
        self._server: asyncio.Server | None = None  # without TLS
        self._timer: asyncio.TimerHandle | None = None

    @property
    def num_connections(self) -> int:
        """Number of open connections."""
        return len(self._state.open)

    async def start(self, host: str, port: int) -> str:
        """Listens, and returns the ``host:port`` in use. Port 0 means any free port.

        Raises:
            Unavailable: the address is in use or does not belong to this machine.
            TlsError: the host is open to other machines and there is no TLS.
        """
        if self._state.tls is None and not is_loopback(host):
            raise TlsError(f"refusing to serve HTTP on {host} in the clear: configure a TLS certificate and key")
        bare, family = socket_host(host)
        try:
            listener = socket.create_server((bare, port), family=family, backlog=_BACKLOG, reuse_port=self._share_port)
        except OSError as error:
            raise Unavailable(f"cannot serve HTTP on {host}:{port}: {error.strerror}") from error
        self._listener = listener
        if self._state.tls is None:
            loop = asyncio.get_running_loop()
            self._server = await loop.create_server(
                lambda: Connection(self._state), sock=listener, backlog=_ACCEPTED_AT_ONCE
            )
            listener.listen(_BACKLOG)  # asyncio has one number for both
        else:
            listener.setblocking(False)
            self._accept_again()
        self._check_times()
        return f"{host}:{listener.getsockname()[1]}"

    def drain(self) -> None:
        """Closes each connection when its answer is complete. New connections are accepted, for one answer each."""
        self._state.draining = True
        for connection in list(self._state.open):
            connection.drain()

    async def stop(self) -> None:
        """Accepts no new connections, and closes each open one when its answer is complete, or after the grace."""
        if self._listener is None:
            return
        if self._server is not None:
            self._server.close()
        else:
            asyncio.get_running_loop().remove_reader(self._listener)
            self._listener.close()
        self._state.max_connections = 0  # for those that have just been accepted
        self.drain()
        await self._none_open(self._stop_grace)
        tasks = [task for connection in list(self._state.open) if (task := connection.stop()) is not None]
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._none_open(1.0)
        if self._timer is not None:
            self._timer.cancel()

    def _accept_again(self) -> None:
        assert self._listener is not None
        assert self._state.tls is not None
        if self._listener.fileno() >= 0:
            asyncio.get_running_loop().add_reader(self._listener, self._accept, self._listener, self._state.tls)

    def _accept(self, listener: socket.socket, contexts: ReloadingValue[ssl.SSLContext]) -> None:
        """Accepts connections for TLS. asyncio's own server would show them only when their handshakes have ended."""
        for _ in range(_ACCEPTED_AT_ONCE):
            try:
                accepted, _ = listener.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:  # no file or memory is free
                logger.warning("cannot accept connections for a second: %s", error.strerror)
                loop = asyncio.get_running_loop()
                loop.remove_reader(listener)
                loop.call_later(1.0, self._accept_again)
                return
            accepted.setblocking(False)
            Connection(self._state).accept(accepted, contexts.value)

    async def _none_open(self, seconds: float) -> None:
        if self._state.open:
            with suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await self._state.none_open.wait()

    def _check_times(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(_ROUND, self._check_times)
        now = self._state.now()
        for connection in list(self._state.open):
            connection.check_time(now)

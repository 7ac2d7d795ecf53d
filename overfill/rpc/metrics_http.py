"""HTTP server of ``/metrics``, on its own port and threads, so that scrapes do not delay tokens on the event loop."""

from __future__ import annotations

import http.client
import io
import ipaddress
import json
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import CollectorRegistry, make_wsgi_app

from overfill.errors import OverfillError, Unauthenticated, Unavailable
from overfill.rpc.access import METRICS_ROUTES, AccessPolicy, bearer, roles_of, unknown
from overfill.rpc.addresses import is_loopback, socket_host
from overfill.rpc.reload import ReloadingValue
from overfill.rpc.tls import ServerTls, TlsError, names_of

HEAD_TIMEOUT = 10.0
"""Seconds for the TLS handshake and the head of the request together, from accept on."""

_ANSWER_TIMEOUT = 10.0
"""Seconds for each write of an answer."""

MAX_CONNECTIONS = 64
"""Maximum open connections. For a further one, the server drops the oldest, preferably one without a complete head."""

MAX_HEAD = 64 << 10
"""Maximum size of a request's head in bytes."""


class MetricsServer:
    """Serves the metrics of ``registry`` from construction until ``close``.

    Args:
        host, port: address to listen on; port 0 picks a free one.
        tls: certificate and key, and the CA of client certificates; None serves without TLS, on loopback only.
        targets: makes the groups of addresses and labels that ``/targets`` returns, for Prometheus'
            ``http_sd_configs``, from the host at which the scraper has reached this server; None serves no
            ``/targets``.
        access: access policy; None admits every caller.

    Attributes:
        address: ``host:port`` in use.

    Raises:
        Unavailable: the address is in use, or does not belong to this machine.
        TlsError: the host is not loopback and ``tls`` is None, or a TLS file cannot be read.
    """

    def __init__(
        self,
        registry: CollectorRegistry,
        host: str,
        port: int,
        tls: ServerTls | None = None,
        targets: Callable[[str], Sequence[dict[str, Any]]] | None = None,
        access: AccessPolicy | None = None,
    ) -> None:
        if tls is None and not is_loopback(host):
            raise TlsError(
                f"refusing to serve metrics on {host} without TLS: configure a certificate and key, or use 127.0.0.1"
            )
        metrics = make_wsgi_app(registry)
        policy = access or AccessPolicy()

        def app(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
            path = environ["PATH_INFO"]
            try:
                _admit(policy, environ)
            except OverfillError as error:
                status = "401 Unauthorized" if isinstance(error, Unauthenticated) else "403 Forbidden"
                start_response(status, [("content-type", "text/plain"), ("www-authenticate", "Bearer")])
                return [f"{error}\n".encode()]
            if path == "/metrics":
                page: Iterable[bytes] = metrics(environ, start_response)
                return page
            if path == "/targets" and targets is not None:
                start_response("200 OK", [("content-type", "application/json")])
                return [json.dumps(targets(environ["overfill.host"])).encode()]
            start_response("404 Not Found", [("content-type", "text/plain")])
            return [b"not found; this port serves /metrics\n"]

        bare, family = socket_host(host)
        kind = type("Server", (_Server,), {"address_family": family, "tls": None if tls is None else tls.contexts()})
        try:
            self._server: WSGIServer = make_server(bare, port, app, kind, _Handler)
        except OSError as error:
            raise Unavailable(f"cannot serve metrics on {host}:{port}: {error.strerror}") from error
        self.address = f"{host}:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, name="metrics", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stops listening."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def _local_host(connection: socket.socket) -> str:
    """Returns this machine's address of ``connection``, in brackets if it is an IPv6 address."""
    address = ipaddress.ip_address(connection.getsockname()[0].partition("%")[0])
    if address.version == 4:
        return str(address)
    return f"[{address}]" if address.ipv4_mapped is None else str(address.ipv4_mapped)


def _admit(access: AccessPolicy, environ: dict[str, Any]) -> None:
    shown, roles = bearer(environ.get("HTTP_AUTHORIZATION", "")), environ["overfill.roles"]
    rule = METRICS_ROUTES.get(environ["PATH_INFO"])
    if rule is None:
        unknown(access, shown, roles)
    else:
        access.check(rule, shown, roles)


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True
    request_queue_size = MAX_CONNECTIONS
    tls: ReloadingValue[ssl.SSLContext] | None = None

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._slots = threading.BoundedSemaphore(MAX_CONNECTIONS)
        self._lock = threading.Lock()
        self._has_head: dict[socket.socket, bool] = {}  # the open connections, oldest first

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self._slots.acquire(blocking=False):
            self._drop_one()
            if not self._slots.acquire(timeout=HEAD_TIMEOUT):  # until the dropped connection's thread has ended
                self.shutdown_request(request)
                return
        with self._lock:
            self._has_head[request] = False
        try:
            super().process_request(request, client_address)
        except BaseException:
            self._forget(request)
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._forget(request)

    def head_complete(self, connection: socket.socket) -> None:
        """Notes that ``connection`` has sent a whole head, so that it is dropped after those that have not."""
        with self._lock:
            if connection in self._has_head:
                self._has_head[connection] = True

    def _drop_one(self) -> None:
        """Ends the oldest connection without a complete head; when all have one, the oldest connection.

        A scraper sends its head at once, so clients that send slowly or not at all never keep it out.
        """
        with self._lock:
            oldest = min(self._has_head, key=self._has_head.__getitem__, default=None)
            if oldest is not None:
                del self._has_head[oldest]
                with suppress(OSError):
                    # SSLSocket.shutdown would take away the TLS state that the connection's thread uses.
                    socket.socket.shutdown(oldest, socket.SHUT_RDWR)

    def _forget(self, connection: socket.socket) -> None:
        with self._lock:
            self._has_head.pop(connection, None)
        self._slots.release()

    def get_request(self) -> tuple[socket.socket, Any]:
        connection, address = super().get_request()
        if self.tls is not None:  # the handshake runs on the connection's own thread
            connection = self.tls.value.wrap_socket(connection, server_side=True, do_handshake_on_connect=False)
        return connection, address

    def server_bind(self) -> None:
        # WSGIServer would resolve its own host name here, which may take seconds.
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])
        self.setup_environ()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignores errors of a connection: a scraper that disconnects needs no traceback."""


class _Answer(io.BufferedIOBase):
    """Writes to a connection. Every failure means that the scraper has left, for which wsgiref writes no traceback."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection

    def write(self, data: Any) -> int:
        try:
            self._connection.sendall(data)
        except OSError as error:  # includes ssl.SSLError
            raise ConnectionAbortedError from error
        return len(data)


class _Head(io.RawIOBase):
    """Reads the head of a request within ``HEAD_TIMEOUT`` and ``MAX_HEAD``; the first read makes the TLS handshake.

    Raises:
        TimeoutError: the handshake and the head have taken too long.
        LineTooLong: the head is too long, which ``BaseHTTPRequestHandler`` answers with 431.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._deadline = time.monotonic() + HEAD_TIMEOUT
        self._left = MAX_HEAD

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if self._left <= 0:
            raise http.client.LineTooLong("head")
        self._connection.settimeout(max(self._deadline - time.monotonic(), 0.001))  # 0 would mean not to block
        count = self._connection.recv_into(buffer)
        self._left -= count
        return count


class _Handler(WSGIRequestHandler):
    server: _Server

    def setup(self) -> None:
        super().setup()
        self.rfile = io.BufferedReader(_Head(self.connection))
        self.wfile = _Answer(self.connection)

    def parse_request(self) -> bool:
        parsed = super().parse_request()
        self.connection.settimeout(_ANSWER_TIMEOUT)
        self.server.head_complete(self.connection)
        return parsed

    def get_environ(self) -> dict[str, Any]:
        environ = super().get_environ()
        peer = self.connection
        verified = isinstance(peer, ssl.SSLSocket) and peer.context.verify_mode == ssl.CERT_REQUIRED
        environ["overfill.host"] = _local_host(peer)
        environ["overfill.roles"] = roles_of(names_of(peer.getpeercert())) if verified else None
        return environ

    def log_message(self, format: str, *args: Any) -> None:
        """Logs nothing, because scrapes are frequent."""

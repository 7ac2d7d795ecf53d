"""``/metrics`` of a process, on a port of its own and from a thread of its own: the event loop carries tokens."""

from __future__ import annotations

import json
import socket
import ssl
import threading
from collections.abc import Callable, Iterable, Sequence
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import CollectorRegistry, make_wsgi_app

from overfill.errors import Unavailable
from overfill.rpc.server import is_loopback
from overfill.rpc.tls import ServerTls, TlsError

_CONNECTION_TIMEOUT = 10.0
"""Seconds without a byte after which a connection is dropped."""


class MetricsServer:
    """Serves ``registry`` from its construction until ``close``.

    ``/targets``, where there is one, is what Prometheus' ``http_sd_configs`` reads.

    Args:
        host, port: where to listen; port 0 takes any free one.
        tls: certificate and key, and who must show one; None serves in the clear, on loopback only.
        targets: groups of addresses and their labels.

    Attributes:
        address: host:port in use.

    Raises:
        Unavailable: the address is taken or not this machine's.
        TlsError: the host is open to other machines and there is no TLS, or a file cannot be read.
    """

    def __init__(
        self,
        registry: CollectorRegistry,
        host: str,
        port: int,
        tls: ServerTls | None = None,
        targets: Callable[[], Sequence[dict[str, Any]]] | None = None,
    ) -> None:
        if tls is None and not is_loopback(host):
            raise TlsError(f"refusing to serve metrics on {host} in the clear: configure a TLS certificate and key")
        metrics = make_wsgi_app(registry)

        def app(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
            path = environ["PATH_INFO"]
            if path == "/metrics":
                page: Iterable[bytes] = metrics(environ, start_response)
                return page
            if path == "/targets" and targets is not None:
                start_response("200 OK", [("content-type", "application/json")])
                return [json.dumps(targets()).encode()]
            start_response("404 Not Found", [("content-type", "text/plain")])
            return [b"there is /metrics here\n"]

        bare = host.strip("[]")
        family = socket.AF_INET6 if ":" in bare else socket.AF_INET
        kind = type("Server", (_Server,), {"address_family": family, "tls": None if tls is None else _context(tls)})
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


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True
    tls: ssl.SSLContext | None = None

    def get_request(self) -> tuple[socket.socket, Any]:
        connection, address = super().get_request()
        if self.tls is not None:  # shakes hands on the connection's own thread
            connection = self.tls.wrap_socket(connection, server_side=True, do_handshake_on_connect=False)
        return connection, address

    def server_bind(self) -> None:
        # WSGIServer looks its own name up, which may take seconds.
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])
        self.setup_environ()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A scraper that went away is not worth a traceback."""


class _Handler(WSGIRequestHandler):
    timeout = _CONNECTION_TIMEOUT

    def log_message(self, format: str, *args: Any) -> None:
        """Scrapes are not logged."""


def _context(tls: ServerTls) -> ssl.SSLContext:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    try:
        context.load_cert_chain(tls.cert, tls.key)
        if tls.client_ca is not None:
            context.load_verify_locations(tls.client_ca)
            context.verify_mode = ssl.CERT_REQUIRED
    except (OSError, ssl.SSLError) as error:
        raise TlsError(f"cannot read {tls.cert}, {tls.key} or {tls.client_ca}: {error}") from error
    return context

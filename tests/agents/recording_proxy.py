"""An HTTP server between an agent and a stack: it passes everything on as it comes, and keeps what passed."""

from __future__ import annotations

import http.client
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

_PER_CONNECTION = ("connection", "transfer-encoding", "content-length", "host")
"""Headers that the proxy makes itself. It asks for answers that are not compressed, so that they can be read."""


@dataclass
class Exchange:
    """A request and its response, of which ``answer`` grows while it passes."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes
    status: int = 0
    answer: bytearray = field(default_factory=bytearray)


class RecordingProxy:
    """Serves on a port of loopback while the context manager is open.

    Attributes:
        url: of the proxy, without ``/v1``.
        exchanges: in the order in which the requests came.
        passing: called with an exchange whenever a part of its answer is about to be passed on.
    """

    def __init__(self, upstream: str) -> None:
        self.exchanges: list[Exchange] = []
        self.passing: Callable[[Exchange], None] = lambda exchange: None
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler(upstream))
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    def __enter__(self) -> RecordingProxy:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def _handler(self, upstream: str) -> type[BaseHTTPRequestHandler]:
        proxy, host = self, urlsplit(upstream).netloc

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *arguments: object) -> None:
                pass

            def _pass(self) -> None:
                body = self.rfile.read(int(self.headers.get("content-length") or 0))
                exchange = Exchange(self.command, self.path, dict(self.headers.items()), body)
                proxy.exchanges.append(exchange)
                headers = {k: v for k, v in exchange.headers.items() if k.lower() not in _PER_CONNECTION}
                headers["Accept-Encoding"] = "identity"
                connection = http.client.HTTPConnection(host)
                with suppress(BrokenPipeError, ConnectionResetError):  # the agent has left
                    connection.request(self.command, self.path, body or None, headers)
                    response = connection.getresponse()
                    exchange.status = response.status
                    self.send_response(response.status)
                    for name, value in response.getheaders():
                        if name.lower() not in _PER_CONNECTION:
                            self.send_header(name, value)
                    self.send_header("connection", "close")
                    self.end_headers()
                    while part := response.read1():
                        exchange.answer += part
                        proxy.passing(exchange)
                        self.wfile.write(part)
                        self.wfile.flush()
                connection.close()
                self.close_connection = True

            do_GET = do_HEAD = do_POST = do_DELETE = _pass

        return Handler

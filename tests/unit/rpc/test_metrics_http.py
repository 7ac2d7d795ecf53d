"""Tests the HTTP server of a process's metrics: its pages, and where it may listen."""

import contextlib
import json
import socket
import ssl
import struct
import threading
import urllib.error
import urllib.request

import pytest

from overfill import errors
from overfill.rpc import certificates, metrics_http
from overfill.rpc.access import Role
from overfill.rpc.addresses import instead_of_wildcard
from overfill.rpc.metrics_http import MetricsServer
from overfill.rpc.tls import ServerTls, TlsError
from overfill.telemetry.router_metrics import RouterMetrics


def get(address, path="/metrics"):
    with urllib.request.urlopen(f"http://{address}{path}", timeout=10) as response:
        return response.read().decode()


def test_metrics_are_served_with_targets():
    groups = [{"targets": ["127.0.0.1:1"], "labels": {"stage": "router"}}]
    with contextlib.closing(
        MetricsServer(RouterMetrics().registry, "127.0.0.1", 0, targets=lambda host: groups)
    ) as server:
        assert 'overfill_build_info{stage="router"' in get(server.address)
        assert json.loads(get(server.address, "/targets")) == groups
        with pytest.raises(urllib.error.HTTPError) as missing:
            get(server.address, "/")
        assert missing.value.code == 404
        missing.value.close()
        port = int(server.address.rpartition(":")[2])
        with pytest.raises(errors.Unavailable, match=str(port)):
            MetricsServer(RouterMetrics().registry, "127.0.0.1", port)


def test_metrics_stay_on_this_machine_without_certificates():
    with pytest.raises(TlsError, match=r"0\.0\.0\.0"):
        MetricsServer(RouterMetrics().registry, "0.0.0.0", 0)


@pytest.fixture
def tls(tmp_path):
    """A router's certificate for a server, and a scraper's for its client."""
    certificates.make(tmp_path, roles=[Role.ROUTER, Role.SCRAPER])
    own, scraper = (certificates.role_files(tmp_path, role) for role in (Role.ROUTER, Role.SCRAPER))
    context = ssl.create_default_context(cafile=scraper.ca)
    context.load_cert_chain(scraper.cert, scraper.key)
    return ServerTls(own.cert, own.key, own.ca), context


@pytest.mark.parametrize(("listens", "asked"), [("0.0.0.0", "127.0.0.1"), ("::", "127.0.0.1"), ("::", "[::1]")])
def test_targets_are_made_for_the_host_at_which_the_scraper_asks(tls, listens, asked):
    def targets(host):
        return [{"targets": [instead_of_wildcard(server.address, host), "10.0.0.7:7690"]}]

    own, context = tls
    with contextlib.closing(MetricsServer(RouterMetrics().registry, listens, 0, own, targets=targets)) as server:
        address = f"{asked}:{server.address.rpartition(':')[2]}"
        with urllib.request.urlopen(f"https://{address}/targets", timeout=10, context=context) as response:
            assert json.load(response) == [{"targets": [address, "10.0.0.7:7690"]}]


def test_a_scraper_that_disconnects_needs_no_traceback(tls, capsys):
    asked, gone = threading.Event(), threading.Event()

    def targets(host):
        asked.set()
        gone.wait(10)
        return [{"targets": ["h:1"] * 10_000}] * 100  # more than the kernel buffers

    own, context = tls
    with contextlib.closing(MetricsServer(RouterMetrics().registry, "127.0.0.1", 0, own, targets=targets)) as server:
        port = int(server.address.rpartition(":")[2])
        with socket.create_connection(("127.0.0.1", port), 10) as plain:
            connection = context.wrap_socket(plain, server_hostname="localhost")
            connection.sendall(b"GET /targets HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert asked.wait(10)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            connection.close()
        gone.set()
        (thread,) = (one for one in threading.enumerate() if "process_request_thread" in one.name)
        thread.join(10)
    assert capsys.readouterr().err == ""


class Slow:
    """A metrics server with few places, and clients that send their head slowly, over TLS or without."""

    def __init__(self, stack, tls, targets=None):
        own, self._context = tls or (None, None)
        self.server = MetricsServer(RouterMetrics().registry, "127.0.0.1", 0, own, targets)
        stack.callback(self.server.close)
        self._stack = stack
        self._port = int(self.server.address.rpartition(":")[2])

    def connect(self, said=b""):
        """A connection that has sent ``said``, after its TLS handshake; without ``said`` it has not begun one."""
        connection = self._stack.enter_context(socket.create_connection(("127.0.0.1", self._port), 20))
        if said and self._context is not None:
            connection = self._stack.enter_context(self._context.wrap_socket(connection, server_hostname="localhost"))
        connection.sendall(said)
        return connection

    def scrape(self):
        scheme = "http" if self._context is None else "https"
        with urllib.request.urlopen(
            f"{scheme}://{self.server.address}/metrics", timeout=10, context=self._context
        ) as response:
            return response.status


@pytest.fixture(params=["plain", "tls"])
def either(request):
    """The arguments of ``tls``, or None for a server without TLS."""
    return request.getfixturevalue("tls") if request.param == "tls" else None


def ended(connection):
    """True once the server has ended the connection; raises TimeoutError if it does not."""
    try:
        return connection.recv(100) == b""
    except ConnectionError:
        return True


def test_clients_without_a_whole_head_never_keep_a_scraper_out(monkeypatch, either):
    monkeypatch.setattr(metrics_http, "MAX_CONNECTIONS", 4)
    with contextlib.ExitStack() as stack:
        slow = Slow(stack, either)
        held = [slow.connect(said) for said in (b"", b"GET /met", b"GET /metrics HTTP/1.1\r\nX: ", b"")]
        for oldest in held:
            assert slow.scrape() == 200
            slow.connect(b"G")  # takes the scraper's place
            slow.connect(b"G")
            assert ended(oldest)


def test_an_answer_is_not_dropped_for_clients_without_a_whole_head(monkeypatch):
    monkeypatch.setattr(metrics_http, "MAX_CONNECTIONS", 3)
    asked, goes_on = threading.Event(), threading.Event()

    def targets(host):
        asked.set()
        assert goes_on.wait(20)
        return []

    with contextlib.ExitStack() as stack:
        slow = Slow(stack, None, targets)
        stack.callback(goes_on.set)
        first = slow.connect(b"GET /targets HTTP/1.0\r\n\r\n")
        assert asked.wait(10)
        idle = [slow.connect() for _ in range(5)]
        assert all(ended(connection) for connection in idle[:3])
        goes_on.set()
        assert first.recv(1000).startswith(b"HTTP/1.0 200")


def test_handshake_and_head_have_one_deadline(monkeypatch, either):
    monkeypatch.setattr(metrics_http, "HEAD_TIMEOUT", 0.5)
    with contextlib.ExitStack() as stack:
        connection = Slow(stack, either).connect(b"GET /metrics HTTP/1.1\r\nX: ")
        connection.settimeout(0.1)
        with contextlib.suppress(ConnectionError):  # the server has ended the connection
            for _ in range(200):
                try:
                    assert connection.recv(100) == b""
                    break
                except TimeoutError:
                    connection.sendall(b"a")
            else:
                raise AssertionError("each byte gives the client more time")


def test_a_head_without_end_is_refused(monkeypatch):
    with contextlib.ExitStack() as stack:
        connection = Slow(stack, None).connect(b"GET /metrics HTTP/1.1\r\n")
        line = b"X: " + b"a" * 1000 + b"\r\n"
        connection.sendall(line * (metrics_http.MAX_HEAD // len(line) + 1))
        assert connection.recv(100).startswith(b"HTTP/1.0 431")

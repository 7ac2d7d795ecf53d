"""Tests the HTTP server of a process's metrics: its pages, and where it may listen."""

import json
import socket
import ssl
import struct
import threading
import urllib.error
import urllib.request

import pytest

from overfill import errors
from overfill.rpc import certificates
from overfill.rpc.access import Role
from overfill.rpc.addresses import instead_of_wildcard
from overfill.rpc.metrics_http import MetricsServer
from overfill.rpc.tls import ServerTls, TlsError
from overfill.telemetry.metrics import RouterMetrics


def get(address, path="/metrics"):
    with urllib.request.urlopen(f"http://{address}{path}", timeout=10) as response:
        return response.read().decode()


def test_metrics_are_served_with_targets():
    groups = [{"targets": ["127.0.0.1:1"], "labels": {"stage": "router"}}]
    server = MetricsServer(RouterMetrics().registry, "127.0.0.1", 0, targets=lambda host: groups)
    try:
        assert 'overfill_build_info{stage="router"' in get(server.address)
        assert json.loads(get(server.address, "/targets")) == groups
        with pytest.raises(urllib.error.HTTPError) as missing:
            get(server.address, "/")
        assert missing.value.code == 404
        missing.value.close()
        port = int(server.address.rpartition(":")[2])
        with pytest.raises(errors.Unavailable, match=str(port)):
            MetricsServer(RouterMetrics().registry, "127.0.0.1", port)
    finally:
        server.close()


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
    server = MetricsServer(RouterMetrics().registry, listens, 0, own, targets=targets)
    address = f"{asked}:{server.address.rpartition(':')[2]}"
    try:
        with urllib.request.urlopen(f"https://{address}/targets", timeout=10, context=context) as response:
            assert json.load(response) == [{"targets": [address, "10.0.0.7:7690"]}]
    finally:
        server.close()


def test_a_scraper_that_disconnects_needs_no_traceback(tls, capsys):
    asked, gone = threading.Event(), threading.Event()

    def targets(host):
        asked.set()
        gone.wait(10)
        return [{"targets": ["h:1"] * 10_000}] * 100  # more than the kernel buffers

    own, context = tls
    server = MetricsServer(RouterMetrics().registry, "127.0.0.1", 0, own, targets=targets)
    try:
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
    finally:
        server.close()
    assert capsys.readouterr().err == ""

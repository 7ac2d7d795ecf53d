"""Tests the HTTP server of a process's metrics: its pages, and where it may listen."""

import json
import urllib.error
import urllib.request

import pytest

from overfill import errors
from overfill.rpc.metrics_http import MetricsServer
from overfill.rpc.tls import TlsError
from overfill.telemetry.metrics import RouterMetrics


def get(address, path="/metrics"):
    with urllib.request.urlopen(f"http://{address}{path}", timeout=10) as response:
        return response.read().decode()


def test_metrics_are_served_with_targets():
    groups = [{"targets": ["127.0.0.1:1"], "labels": {"stage": "router"}}]
    server = MetricsServer(RouterMetrics().registry, "127.0.0.1", 0, targets=lambda: groups)
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

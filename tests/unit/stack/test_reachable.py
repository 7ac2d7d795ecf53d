"""Tests that a stack on several machines lists all settings that it lacks at once."""

from __future__ import annotations

import pytest


def test_several_machines_need_an_open_host_and_all_files() -> None:
    app = pytest.importorskip("services.ray.app", reason="needs Ray")
    app.check_reachable("127.0.0.1", {"10.0.0.1"})
    app.check_reachable("0.0.0.0", {"10.0.0.1", "10.0.0.2"})
    with pytest.raises(ValueError, match=r"and api_keys, tls_cert, tls_key and tls_ca to files on every machine"):
        app.check_reachable("127.0.0.1", {"10.0.0.1", "10.0.0.2"})

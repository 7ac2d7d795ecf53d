"""Tests the options of ``overfill loadtest``: their help, their limits, and the variables that they read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from overfill.cli.main import main
from overfill.lab.loadtest import run
from overfill.lab.loadtest.plan import LoadPlan
from overfill.rpc.tls import ClientTls


def test_certificates_and_key_come_from_the_variables_of_client_commands(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    runs: list[Any] = []

    def run_test(plan: LoadPlan, requests: Any, tls: Any, api_key: Any) -> list[Any]:
        runs.append((plan, tls, api_key))
        return []

    monkeypatch.setattr(run, "run_test", run_test)
    assert main(["loadtest", "--tier=full", "--tier=fast=2"]) == 2
    certificate = tmp_path / "ca.crt"
    certificate.touch()
    monkeypatch.setenv("OVERFILL_TLS_CA", str(certificate))
    monkeypatch.setenv("OVERFILL_TLS_NAME", "router")
    monkeypatch.setenv("OVERFILL_API_KEY", "secret")
    monkeypatch.setenv("OVERFILL_ADDRESS", "router:7600")
    assert main(["loadtest", "--allow-brownout"]) == 2
    assert runs == [
        (LoadPlan(tier=("full", "fast=2")), None, None),
        (LoadPlan(target="router:7600", allow_brownout=True), ClientTls(certificate, name="router"), "secret"),
    ]

"""Tests the options of ``overfill loadtest``: their help, their limits, and the variables that they read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from overfill.cli.main import main
from overfill.lab.commands import loadtest
from overfill.lab.loadtest.plan import LoadPlan


def test_certificates_come_from_the_variables_of_client_commands(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    plans: list[LoadPlan] = []

    def run(plan: LoadPlan, api_key: Any) -> int:
        plans.append(plan)
        return 0

    monkeypatch.setattr(loadtest, "_run", run)
    assert main(["loadtest"]) == 0
    certificate = tmp_path / "ca.crt"
    certificate.touch()
    monkeypatch.setenv("OVERFILL_TLS_CA", str(certificate))
    monkeypatch.setenv("OVERFILL_TLS_NAME", "router")
    assert main(["loadtest"]) == 0
    assert plans == [LoadPlan(), LoadPlan(tls_ca=str(certificate), tls_name="router")]

"""Tests the options of ``overfill loadtest``: their help, their limits, and the variables that they read."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import click
import pytest

from overfill.cli.main import main
from overfill.lab.commands import loadtest
from overfill.lab.loadtest.plan import LoadPlan


def test_help_shows_every_default_and_limit() -> None:
    context = click.Context(loadtest.loadtest_command)
    shown = {
        param.name: record[1]
        for param in loadtest.loadtest_command.params
        if isinstance(param, click.Option) and (record := param.get_help_record(context)) is not None
    }
    for field in fields(LoadPlan):
        if not (field.default in (None, "") or field.default is False):
            assert re.search(rf"[\[ ]default: {re.escape(str(field.default))}", shown[field.name])
        assert "By default" not in shown[field.name]
    assert "[default: 4; x>=1]" in shown["users"]
    assert "[default: 60; for ramp and spike 120, for soak 3600]  [x>0]" in shown["duration"]


@pytest.mark.parametrize("argv", [("--users", "0"), ("--rate", "0"), ("--duration", "nan")])
def test_a_number_out_of_range_is_wrong_usage(argv: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["loadtest", *argv]) == 2
    assert f"'{argv[0]}'" in capsys.readouterr().err


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

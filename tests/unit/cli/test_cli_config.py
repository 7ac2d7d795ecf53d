"""Tests ``overfill config``, and the settings that ``overfill up`` reads from a file."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from pydantic import SecretStr

from overfill.cli.config import display
from overfill.cli.main import main
from overfill.stack.describe import threads_per_worker
from overfill.stack.placed import PlacedStack

FILE = """
common: {pair: /pairs/mine, kv-memory: 64MiB, log-level: warning}
router: {port: 7700, http: 8000}
decode: {threads: 3}
"""


@pytest.fixture(autouse=True)
def _no_settings_in_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.startswith("OVERFILL_"):
            monkeypatch.delenv(name)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "stack.yaml"
    path.write_text(FILE)
    return path


def shown(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, dict[str, dict[str, str]]]:
    capsys.readouterr()
    assert main(["config", "show", "--json", *arguments]) == 0
    result: dict[str, dict[str, dict[str, str]]] = json.loads(capsys.readouterr().out)
    return result


def test_show_prints_each_value_and_its_origin(
    file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OVERFILL_DECODE_MAX_NUM_SEQS", "8")
    decode = shown(capsys, "decode", "--config", str(file), "--", "--block-size=32")["decode"]
    assert decode["kv-memory"] == {"value": str(64 << 20), "from": f"{file}: common.kv-memory"}
    assert decode["threads"] == {"value": "3", "from": f"{file}: decode.threads"}
    assert decode["max-num-seqs"] == {"value": "8", "from": "OVERFILL_DECODE_MAX_NUM_SEQS"}
    assert decode["block-size"] == {"value": "32", "from": "--block-size"}
    assert decode["host"] == {"value": "127.0.0.1", "from": "default"}


def test_show_works_before_there_is_a_pair(capsys: pytest.CaptureFixture[str]) -> None:
    everything = shown(capsys)
    assert set(everything) == {"router", "prefill", "decode", "colocated"}
    assert everything["router"]["pair"] == {"value": "", "from": "required"}
    assert main(["config", "show", "router"]) == 0
    assert "127.0.0.1" in capsys.readouterr().out


def test_secrets_are_not_shown() -> None:
    assert display(SecretStr("hunter2")) == "********"


def test_check(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OVERFILL_ROUTER_PORT", "many")  # an error, but not of the file
    assert main(["config", "check", str(file)]) == 0
    assert "valid (6 settings)" in capsys.readouterr().out
    file.write_text("router: {port: 70000}\nprefill: {host: 10.1.2.3}")
    assert main(["config", "check", str(file)]) == 1
    err = capsys.readouterr().err
    assert f"{file}: router.port: " in err
    assert f"{file}: prefill: --host 10.1.2.3 is open" in err
    file.write_text("router: {prot: 1}")
    assert main(["config", "check", str(file)]) == 1
    assert "router.prot: no such setting; did you mean port?" in capsys.readouterr().err


def test_check_finds_faults_in_the_settings_of_tiers(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file.write_text('router: {tiers: "full=identity; fast=fast,bogus=1; other=fast,quantize=int3"}')
    assert main(["config", "check", str(file)]) == 1
    err = capsys.readouterr().err
    assert f"{file}: router.tiers: tier fast: bogus: a tier has no such setting" in err
    assert f"{file}: router.tiers: tier other: --quantize" in err


def test_up_starts_what_the_file_says(
    file: Path, unchecked: list[PlacedStack], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(file.parent)
    numbers = ["--prefill", "2", "--decode", "1"]
    assert main(["up", "--no-ray", "--config", str(file), *numbers, "--log-dir", "logs"]) == 0
    (plan,) = unchecked
    assert (len(plan.prefill), len(plan.decode)) == (2, 1)
    assert plan.routers[0].port == 7700
    assert plan.routers[0].http == 8000
    assert plan.prefill[0].kv_memory == 64 << 20
    assert plan.decode[0].threads == 3
    assert plan.prefill[0].threads == threads_per_worker(2)
    assert {str(config.pair) for config in (*plan.routers, *plan.prefill, *plan.decode)} == {"/pairs/mine"}
    assert (file.parent / "logs").is_dir()

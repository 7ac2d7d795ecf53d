"""Tests that earlier names of settings still work everywhere, with a warning that gives both names."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from overfill.cli.options import RenamedFlags
from overfill.settings import renamed
from overfill.settings.config import DecodeConfig, PrefillConfig, RouterConfig, read_checked
from overfill.settings.config_file import BadConfigFile
from overfill.stack.spec import StackSpec


@pytest.fixture(autouse=True)
def _renamed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in os.environ:
        if name.startswith("OVERFILL_"):
            monkeypatch.delenv(name)
    monkeypatch.setattr(renamed, "RENAMED", {"kv_space": "kv_memory", "log": "log_level", "port": "metrics_port"})
    renamed.warn.cache_clear()
    yield
    renamed.warn.cache_clear()


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "overfill.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("argv", [["--kv-space", "2GiB"], ["--kv-space=2GiB"]])
def test_an_earlier_flag_works(argv: list[str], caplog: pytest.LogCaptureFixture) -> None:
    assert PrefillConfig.parse(["--pair=p", *argv]).kv_memory == 2 << 30
    assert PrefillConfig.origins(argv) == {"kv_memory": "--kv-memory"}
    assert caplog.messages == ["--kv-space is now --kv-memory; the old name works until version 0.3"]


def test_an_earlier_variable_works_unless_the_new_one_is_set(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("OVERFILL_PREFILL_KV_SPACE", "2GiB")
    assert PrefillConfig.parse(["--pair=p"]).kv_memory == PrefillConfig.of({"pair": "p"}).kv_memory == 2 << 30
    assert PrefillConfig.origins([]) == {"kv_memory": "OVERFILL_PREFILL_KV_SPACE"}
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "OVERFILL_PREFILL_KV_SPACE is now OVERFILL_PREFILL_KV_MEMORY" in caplog.text
    monkeypatch.setenv("OVERFILL_PREFILL_KV_MEMORY", "3GiB")
    assert PrefillConfig.parse(["--pair=p"]).kv_memory == 3 << 30
    assert PrefillConfig.origins([]) == {"kv_memory": "OVERFILL_PREFILL_KV_MEMORY"}


def test_an_earlier_key_of_a_file_works_and_variables_beat_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = written(tmp_path, "common: {pair: p, log: debug}\nprefill: {kv-space: 2GiB}")
    config = PrefillConfig.parse([f"--config={path}"])
    assert (config.kv_memory, config.log_level) == (2 << 30, "debug")
    assert "prefill.kv-space is now prefill.kv-memory" in caplog.text
    assert "common.log is now common.log-level" in caplog.text
    monkeypatch.setenv("OVERFILL_PREFILL_KV_SPACE", "3GiB")
    assert PrefillConfig.parse([f"--config={path}"]).kv_memory == 3 << 30


def test_a_file_with_both_names_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path, "prefill: {kv-space: 2GiB, kv-memory: 2GiB}")
    said = r"prefill\.kv-space: this is the earlier name of kv-memory: remove kv-space"
    with pytest.raises(BadConfigFile, match=said):
        read_checked(path)


def test_only_services_with_the_setting_know_its_earlier_name(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("OVERFILL_ROUTER_KV_SPACE", "2GiB")
    with pytest.raises(SystemExit):
        RouterConfig.parse(["--pair=p"])
    assert "OVERFILL_ROUTER_KV_SPACE: no such setting" in capsys.readouterr().err
    with pytest.raises(BadConfigFile, match=r"router\.kv-space: no such setting"):
        read_checked(written(tmp_path, "router: {kv-space: 2GiB}"))


def test_a_current_name_is_not_renamed() -> None:
    config = RouterConfig.parse(["--pair=p", "--port=1"])
    assert (config.port, config.metrics_port) == (1, 0)


def test_earlier_settings_of_a_stack_on_ray_work(caplog: pytest.LogCaptureFixture) -> None:
    spec = StackSpec.model_validate(
        {"pair": "p", "settings": {"log": "debug"}, "decode": {"settings": {"kv_space": 4}}}
    )
    assert (spec.worker_config("decode").log_level, spec.worker_config("decode").kv_memory) == ("debug", 4)
    assert "kv_space is now kv_memory" in caplog.text
    assert DecodeConfig.of({"pair": "p", "kv_space": 4}).kv_memory == 4
    with pytest.raises(ValueError, match="kv_space is the earlier name of kv_memory"):
        DecodeConfig.of({"pair": "p", "kv_space": 4, "kv_memory": 4})


def test_earlier_flags_of_a_command_work(caplog: pytest.LogCaptureFixture) -> None:
    @click.command(cls=RenamedFlags, renamed={"share": "load-fraction"})
    @click.option("--kv-memory")
    @click.option("--load-fraction")
    @click.argument("rest", nargs=-1)
    def command(kv_memory: str, load_fraction: str, rest: tuple[str, ...]) -> None:
        click.echo(f"{kv_memory} {load_fraction} {rest}")

    done = CliRunner().invoke(command, ["--kv-space", "1", "--share=2", "--", "--share"])
    assert "1 2 ('--share',)" in done.output
    assert "--kv-space is now --kv-memory" in caplog.text
    assert "--share is now --load-fraction" in caplog.text
    caplog.clear()
    CliRunner().invoke(command, ["--share=2"])
    assert not caplog.messages  # once per process

"""Tests the file of settings: its sections, their precedence, and how faults are reported."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from overfill.settings.config import SERVICES, DecodeConfig, PrefillConfig, RouterConfig, read_checked
from overfill.settings.config_file import BadConfigFile, flag_name

YAML = """
common:
  pair: /pairs/mine
  grace-period: 5
prefill:
  kv-memory: 2GiB
  grace-period: 7
  prefix-cache: on
decode:
  routers: [a:1, b:2]
router:
"""
TOML = """
[common]
pair = "/pairs/mine"
grace-period = 5
[prefill]
kv-memory = "2GiB"
grace-period = 7
prefix-cache = "on"
[decode]
routers = ["a:1", "b:2"]
"""


@pytest.fixture(autouse=True)
def _no_settings_in_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.startswith("OVERFILL_"):
            monkeypatch.delenv(name)


@pytest.fixture(params=["yaml", "toml"])
def file(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    path = tmp_path / f"overfill.{request.param}"
    path.write_text({"yaml": YAML, "toml": TOML}[request.param])
    return path


def written(tmp_path: Path, text: str, name: str = "overfill.yaml") -> Path:
    path = tmp_path / name
    path.write_text(text)
    return path


def faults(path: Path) -> list[str]:
    with pytest.raises(BadConfigFile) as caught:
        read_checked(path)
    return caught.value.faults


def test_a_section_beats_common_and_only_its_service_reads_it(file: Path) -> None:
    prefill = PrefillConfig.parse(["--config", str(file)])
    assert (prefill.pair, prefill.kv_memory, prefill.grace_period) == ("/pairs/mine", 2 << 30, 7)
    assert prefill.prefix_cache is True
    decode = DecodeConfig.parse([f"--config={file}"])
    assert (decode.routers, decode.kv_memory, decode.grace_period) == (("a:1", "b:2"), None, 5)
    assert RouterConfig.parse([f"--config={file}"]).grace_period == 5


def test_flags_beat_variables_which_beat_the_file(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OVERFILL_PREFILL_CONFIG", str(file))
    monkeypatch.setenv("OVERFILL_PREFILL_KV_MEMORY", "3GiB")
    monkeypatch.setenv("OVERFILL_PREFILL_GRACE_PERIOD", "8")
    config = PrefillConfig.parse(["--grace-period", "9"])
    assert (config.kv_memory, config.grace_period, config.pair) == (3 << 30, 9, "/pairs/mine")
    given = PrefillConfig.given({"grace_period": "9"})
    assert {name: one.origin for name, one in given.items()} == {
        "config": "OVERFILL_PREFILL_CONFIG",
        "pair": f"{file}: common.pair",
        "kv_memory": "OVERFILL_PREFILL_KV_MEMORY",
        "grace_period": "--grace-period",
        "prefix_cache": f"{file}: prefill.prefix-cache",
    }


def test_a_process_needs_no_file(file: Path) -> None:
    config = DecodeConfig.parse([f"--config={file}"])
    again = DecodeConfig.of(config.settings())
    assert again == config.model_copy(update={"config": None})


def test_an_earlier_file_is_forgotten(file: Path) -> None:
    PrefillConfig.parse([f"--config={file}"])
    assert PrefillConfig.parse(["--pair", "p"]).kv_memory is None


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("prefill:\n  kv-memroy: 1GiB", "prefill.kv-memroy: no such setting; did you mean kv-memory?"),
        ("prefill:\n  kv_memory: 1GiB", "did you mean kv-memory?"),
        ("prefil:\n  threads: 1", "prefil: unknown section; did you mean prefill?"),
        ("prefill:\n  colour: red", "prefill.colour: no such setting; `overfill config show prefill` lists all names"),
        ("kitchen:\n  threads: 1", "kitchen: unknown section; `overfill config show` lists all names"),
        ("common:\n  config: x.yaml", "common.config: no such setting"),
        (
            "router:\n  kv-memory: 1GiB",
            "router.kv-memory: no such setting; kv-memory is a setting of prefill and decode",
        ),
        ("prefill:\n  threads: 1\n  threads: 2", "the key threads appears twice"),
        ("prefill: &a\n  threads: *a", "has more than 10000 values, with each alias"),
        ("prefill: 3", "prefill: expected settings in this section"),
        ("- a", "expected sections"),
        ("a: [", "expected"),
    ],
)
def test_faults_of_a_file_are_reported_by_key(text: str, says: str, tmp_path: Path) -> None:
    path = written(tmp_path, text)
    (fault,) = faults(path)
    assert fault.startswith(f"{path}: ")
    assert says in fault


@pytest.mark.parametrize("value", ["true", "false"])
def test_a_boolean_is_refused_as_a_setting_of_a_service(value: str, tmp_path: Path) -> None:
    text = f"[router]\nhttp = {value}\nport = {value}\n[common]\ngrace-period = {value}"
    told = faults(written(tmp_path, text, "overfill.toml"))
    assert len(told) == 3
    assert f'router.http: expected text or a number, such as "off" or 8000, got {value}' in told[0]


@pytest.mark.parametrize(("name", "text"), [("a.yaml", "router: {http: off}"), ("a.toml", '[router]\nhttp = "off"')])
def test_off_is_text_in_both_kinds_of_file(name: str, text: str, tmp_path: Path) -> None:
    assert RouterConfig.parse(["--pair=p", f"--config={written(tmp_path, text, name)}"]).http == "off"


def test_all_unknown_keys_are_reported_at_once(tmp_path: Path) -> None:
    assert len(faults(written(tmp_path, "router:\n  prot: 1\n  hots: x\ndecod:\n  a: b"))) == 3


def test_a_missing_file_or_one_of_another_kind_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        RouterConfig.parse(["--config", str(tmp_path / "no.yaml")])
    assert caught.value.code == 2
    assert "no.yaml: cannot be read" in capsys.readouterr().err
    assert "its name must end in .yaml, .yml or .toml" in faults(written(tmp_path, "", "overfill.ini"))[0]


def test_a_wrong_value_is_reported_with_its_place_in_the_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(tmp_path, "common:\n  pair: p\n  port: many")
    with pytest.raises(SystemExit):
        RouterConfig.parse([f"--config={path}"])
    assert f"{path}: common.port: " in capsys.readouterr().err
    assert RouterConfig.parse([f"--config={path}", "--port=1"]).port == 1


def test_every_setting_is_a_key_of_its_section_and_of_common(tmp_path: Path) -> None:
    for kind in SERVICES:
        for name in kind.model_fields:
            if name != "config":
                read_checked(
                    written(tmp_path, f"common: {{{flag_name(name)}: x}}\n{kind.section}: {{{flag_name(name)}: x}}")
                )


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("OVERFILL_PREFILL_KV_MEMROY", "did you mean OVERFILL_PREFILL_KV_MEMORY?"),
        # similar to none but for its prefix
        ("OVERFILL_PREFILL_COLOUR", "COLOUR: no such setting; `overfill config show prefill` lists all names"),
    ],
)
def test_an_unknown_variable_is_an_error_and_names_the_nearest(
    name: str, says: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(name, "1GiB")
    with pytest.raises(SystemExit):
        PrefillConfig.parse(["--pair", "p"])
    assert says in capsys.readouterr().err
    DecodeConfig.parse(["--pair", "p"])  # the variable is another program's

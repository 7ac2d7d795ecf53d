"""Tests ``overfill pair adapter`` as a person calls it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from peft_adapters import save_peft

from overfill.cli.pair import pair_group
from overfill.making.tiny import make_tiny_pair
from overfill.model.adapter import WEIGHTS
from overfill.model.adapter_files import InvalidAdapter
from overfill.model.manifest import Pair


@pytest.fixture
def call(tiny_pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    monkeypatch.setenv("OVERFILL_HOME", str(tmp_path / "home"))

    def call(command: str, *arguments: Any, pair: Path = tiny_pair) -> Result:
        line = ["adapter", command, str(pair), *map(str, arguments)]
        return CliRunner().invoke(pair_group, line, standalone_mode=False)

    return call


@pytest.fixture
def peft(tiny_pair: Path, tmp_path: Path) -> Path:
    return save_peft(Pair.load(tiny_pair), tmp_path / "peft", target_modules=["q_proj", "v_proj"])


def test_an_adapter_from_add_to_remove(call: Callable[..., Result], peft: Path, tmp_path: Path) -> None:
    assert json.loads(call("list", "--json").stdout)["adapters"] == []
    added = call("add", peft, "--name", "planner", "--tail-tokens", 3)
    folder = Path(added.stdout.strip())
    assert folder.is_relative_to(tmp_path / "home" / "adapters")
    assert "3 tokens before the answer" in added.stderr
    assert "with its own prefill" in added.stderr
    assert "on the full model's KV, as it is served" in call("add", peft, "--name", "coder", "--on-full-kv").stderr
    facts = json.loads(call("show", "planner", "--json").stdout)
    assert (facts["layers"], facts["projections"], facts["rank"]) == (4, ["q_proj", "v_proj"], 4)
    assert facts["weights"] == 4 * 4 * ((64 + 64) + (64 + 32))
    listed = call("list").stdout
    assert "coder" in listed
    assert "planner" in listed
    assert call("remove", "coder").exception is None
    (left,) = json.loads(call("list", "--json").stdout)["adapters"]
    assert (left["name"], left["state"], left["takes_over"]) == ("planner", "ready", "3 tokens before the answer")


def test_adapters_of_another_decoder_and_damaged_ones_are_named(
    call: Callable[..., Result], peft: Path, tmp_path: Path
) -> None:
    there = ("--adapters", tmp_path / "there")
    for name in ("one", "two"):
        call("add", peft, "--name", name, *there)
    other = make_tiny_pair(tmp_path / "other", decoder_seed=1)
    shown = call("show", "one", *there, pair=other)
    assert "one is of the decoder" in str(shown.exception)
    (tmp_path / "there" / "two" / "overfill-adapter.json").unlink()
    listed = call("list", *there, pair=other)
    assert "of another decoder" in listed.stdout
    assert "damaged" in listed.stdout
    assert "overfill-adapter.json: missing" in listed.stderr
    (tmp_path / "there" / "one" / WEIGHTS).write_bytes(b"")
    with pytest.raises(InvalidAdapter, match="not a safetensors file"):
        raise call("show", "one", *there).exception or AssertionError
    with pytest.raises(InvalidAdapter, match="has no adapter 'three'; there are one, two"):
        raise call("show", "three", *there).exception or AssertionError

"""Tests ``overfill pair distill`` and ``distill-plot`` on the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from overfill.cli import distill
from overfill.cli.distill import distill_command, distill_plot_command
from overfill.making.distill.train import Run
from overfill.making.tiny import make_tiny_pair
from overfill.model.manifest import Pair


@pytest.fixture(autouse=True)
def allocator_untouched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distill, "set_threads", lambda threads: None)


@pytest.fixture
def chats(tmp_path: Path) -> str:
    file = tmp_path / "chats.jsonl"
    turns = [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "It is a river, a bridge."}]
    file.write_text((json.dumps({"messages": turns}) + "\n") * 8)
    return str(file)


def call(*arguments: str | Path) -> Result:
    return CliRunner().invoke(distill_command, [*map(str, arguments), "--not-fused"])  # compiling takes a minute


def test_a_pair_is_distilled_and_drawn(tmp_path: Path, chats: str) -> None:
    pair, out = make_tiny_pair(tmp_path / "pair"), tmp_path / "out"
    options = ["--data", chats, "--held-out", chats, "--steps", "3", "--batch-transcripts", "2", "--eval-steps", "2"]
    result = call(pair, "--out", out, *options, "--sampled-tokens", "64")
    assert result.exit_code == 0, result.output
    assert result.stdout.strip() == str(out)
    assert "step 3, " in result.stderr
    assert Pair.load(out).recipe["distill"]["steps"] == 3

    alone = call(pair, "--out", tmp_path / "alone", *options, "--standalone")
    assert alone.exit_code == 0, alone.output
    runs = [f"two-stage={out}", f"alone={tmp_path / 'alone.run'}"]
    picture = tmp_path / "both.png"
    drawn = CliRunner().invoke(distill_plot_command, [*runs, "--out", str(picture)])
    assert drawn.exit_code == 0, drawn.output
    assert picture.stat().st_size > 1000


def test_a_run_without_figures_yet_can_be_drawn(tmp_path: Path) -> None:
    """Its metrics stay empty until the first evaluation has ended, which takes minutes."""
    (tmp_path / "new.run").mkdir()
    (tmp_path / "new.run" / "metrics.jsonl").touch()
    picture = tmp_path / "new.png"
    drawn = CliRunner().invoke(distill_plot_command, [f"new={tmp_path / 'new.run'}", "--out", str(picture)])
    assert drawn.exit_code == 0, drawn.output
    assert picture.stat().st_size > 1000


def test_a_stopped_run_says_how_to_continue(tmp_path: Path, chats: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def press_ctrl_c(run: Run) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Run, "_run", press_ctrl_c)
    pair = make_tiny_pair(tmp_path / "pair")
    result = call(pair, "--out", tmp_path / "out", "--data", chats, "--held-out", chats, "--steps", "3")
    assert result.exit_code != 0
    assert "--resume to continue" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["somewhere"], "--out is missing"),
        (["somewhere", "--out", "."], "already exists"),
        (["--out", "new"], "this recipe has no starting pair: give one"),
        (["somewhere", "--out", "new", "--learning-rate", "-1"], "learning_rate"),
        (["somewhere", "--out", "new", "--max-tokens", "0"], "max_tokens"),
        (["somewhere", "--out", "new", "--seed", "-1"], "seed"),
    ],
)
def test_bad_usage_is_explained(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = call(*arguments)
    assert result.exit_code != 0
    assert message in f"{result.output}{result.exception}"

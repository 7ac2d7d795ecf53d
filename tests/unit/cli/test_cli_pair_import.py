"""``overfill pair import`` prints the folder on stdout, the summary on stderr, and says what to do when it refuses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from json_edits import edit

from overfill.cli.main import main
from overfill.model.manifest import Pair


def run(tiny_pair: Path, *more: str) -> int:
    return main(["pair", "import", "--full", str(tiny_pair / "full"), "--decoder", str(tiny_pair / "decoder"), *more])


def test_the_folder_goes_to_stdout_and_the_next_commands_to_stderr(
    tiny_pair: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert run(tiny_pair, "--out", str(out), "--layer-map", "0,1,1,3") == 0
    captured = capsys.readouterr()
    assert captured.out == f"{out}\n"
    assert "warning: the layer map has a layer twice" in captured.err
    assert f"overfill up --pair {out}" in captured.err
    assert Pair.load(out).recipe["decoder"] == str(tiny_pair / "decoder")


def test_a_dry_run_writes_nothing(tiny_pair: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tiny_pair, "--dry-run", "--out", str(tmp_path / "out")) == 0
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "The halves fit. Nothing was written." in captured.err
    assert not any(tmp_path.iterdir())


def test_the_recipe_names_folders_by_their_absolute_paths(
    tiny_pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tiny_pair)
    words = ["--full", "full", "--decoder", "decoder/", "--tokenizer", "full", "--out", str(tmp_path / "out")]
    assert main(["pair", "import", *words]) == 0
    full = str(tiny_pair / "full")
    recipe = {"method": "imported", "full": full, "decoder": str(tiny_pair / "decoder"), "tokenizer": full}
    assert Pair.load(tmp_path / "out").recipe == recipe


@pytest.mark.parametrize("half", ["full", "decoder"])
def test_a_half_that_only_vllm_runs_is_named_with_the_option_that_serves_it(
    half: str, fresh: Callable[[], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pair = fresh()
    edit(pair / half / "config.json", lambda config: config.update(quantization_config={"quant_method": "fp8"}))
    assert run(pair, "--out", str(tmp_path / "out")) == 0
    err = capsys.readouterr().err
    name = "full model" if half == "full" else "decoder"
    assert f"warning: OverFill's own engine does not run the {name}, whose weights are stored in fp8" in err
    assert "engines that do: vllm" in err
    assert "overfill pair show" in err
    stage = "prefill" if half == "full" else "decode"
    assert f"overfill up --pair {tmp_path / 'out'} --{stage}-engine vllm\n" in err
    assert "overfill pair eval" not in err


def test_a_folder_that_cannot_be_made(tiny_pair: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tiny_pair, "--out", "/proc/new") == 1
    assert "cannot write the pair /proc/new" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ([], "--out is missing"),
        (["--out", "."], "already exists"),
        (["--out", "new", "--layer-map", "0,x"], "'0,x' is neither layer numbers such as 0,2,5 nor one of first"),
    ],
)
def test_wrong_options(more: list[str], message: str, tiny_pair: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tiny_pair, *more) == 2
    assert message in capsys.readouterr().err


def test_a_file_instead_of_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "model.gguf"
    file.touch()
    assert main(["pair", "import", "--full", str(file), "--decoder", "a/b", "--out", str(tmp_path / "out")]) == 1
    assert "model.gguf is a file: GGUF is not supported" in capsys.readouterr().err

"""Tests that ``overfill pair show`` reports digests of the present files, not those of the manifest."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from json_edits import edit
from safetensors.torch import load_file, save_file

from overfill.cli.main import main
from overfill.making.pair_json import write_manifest
from overfill.making.tiny import make_tiny_pair
from overfill.model.digest import checkpoint_digest
from overfill.model.manifest import Pair


@pytest.fixture
def pair(tiny_pair: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_pair, tmp_path / "pair"))


def change(checkpoint: Path) -> None:
    """Replaces weights by others of the same shapes, so that only their digest differs."""
    file = checkpoint / "model.safetensors"
    tensors = load_file(file)
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, file, metadata={"format": "pt"})


def test_the_digests_of_a_whole_pair(pair: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pair", "show", str(pair), "--json"]) == 0
    captured = capsys.readouterr()
    told = json.loads(captured.out)
    for half in ("full", "decoder"):
        assert told[half]["digest"] == checkpoint_digest(pair / half)
        assert "manifest_digest" not in told[half]
    assert "digest" not in captured.err


def test_what_a_token_reads_stands_beside_the_parameters(pair: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The embedding counts among the parameters; a token reads one row of it."""
    assert main(["pair", "show", str(pair), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    full, decoder = told["full"], told["decoder"]
    layers = 4 * (128 * 64 + 64 * 64)  # qkv and o: 4 heads and 2 KV heads of 16
    assert full["weights_read"] == layers + 4 * 3 * 128 * 64 + 512 * 64
    assert decoder["weights_read"] == layers + 4 * 3 * 64 * 64 + 512 * 64
    norms = 9 * 64
    assert full["parameters"] == full["weights_read"] + 512 * 64 + norms

    assert main(["pair", "show", str(pair)]) == 0
    rows = capsys.readouterr().out.splitlines()
    named = [row.split()[0] for row in rows]
    assert named[named.index("decoder.parameters") + 1] == "decoder.weights_read"
    share = 100 * decoder["weights_read"] / full["weights_read"]
    assert rows[-1] == f"A token of an answer reads {share:.0f} % of the full model's weights."


@pytest.mark.parametrize("half", ["full", "decoder"])
@pytest.mark.parametrize("options", [[], ["--json"]], ids=["text", "json"])
def test_weights_that_changed_are_shown_with_both_digests(
    half: str, options: list[str], pair: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stated = getattr(Pair.load(pair), f"{half}_digest")
    change(pair / half)
    found = checkpoint_digest(pair / half)
    assert main(["pair", "show", str(pair), *options]) == 1
    captured = capsys.readouterr()
    for digest in (stated, found):
        assert digest in captured.out
        assert digest in captured.err
    assert f"{half}: " in captured.err
    if options:
        told = json.loads(captured.out)
        assert (told[half]["digest"], told[half]["manifest_digest"]) == (found, stated)


def test_changed_weights_of_a_pair_whose_decoder_is_the_full_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pair = make_tiny_pair(tmp_path / "identity", identity=True)
    change(pair / "full")
    assert main(["pair", "show", str(pair), "--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert told["decoder"]["digest"] == told["full"]["digest"] == checkpoint_digest(pair / "full")


def test_tensors_that_do_not_fit_the_config_and_values_that_are_not_finite(
    pair: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, file = pair / "decoder" / "config.json", pair / "decoder" / "model.safetensors"
    edit(config, lambda content: content.update(intermediate_size=72))
    tensors = load_file(file)
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, file, metadata={"format": "pt"})
    assert main(["pair", "show", str(pair), "--json"]) == 1
    captured = capsys.readouterr()
    problems = json.loads(captured.out)["decoder"]["problems"]
    for words in ("the config implies", "model.norm.weight holds NaN or infinity", "build or import the pair again"):
        assert sum(words in problem for problem in problems) == 1
        assert words in captured.err


def test_engines_are_those_of_the_files(pair: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit(pair / "pair.json", lambda manifest: manifest["decoder"].update(engines=["vllm"]))
    assert main(["pair", "show", str(pair), "--json"]) == 1
    captured = capsys.readouterr()
    assert json.loads(captured.out)["decoder"]["engines"] == ["overfill", "vllm"]
    assert "overfill, vllm; pair.json says vllm" in captured.err


def test_an_int8_identity_pair_has_the_decoder_s_engines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pair = make_tiny_pair(tmp_path / "identity", identity=True)
    write_manifest(pair, decoder="full", recipe={"quantize": "int8"})
    assert main(["pair", "show", str(pair), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["full"]["engines"] == ["overfill", "vllm"]
    assert told["decoder"]["engines"] == ["overfill"]
    assert told["decoder"]["digest"] == told["full"]["digest"]


def test_a_tied_head_that_differs_is_shown(pair: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit(pair / "full" / "config.json", lambda config: config.update(tie_word_embeddings=True))
    assert main(["pair", "show", str(pair)]) == 1
    assert "the config ties the embeddings, but lm_head.weight differs" in capsys.readouterr().err

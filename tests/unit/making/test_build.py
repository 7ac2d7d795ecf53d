from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from json_edits import edit
from transformers import AutoModelForCausalLM

from overfill.errors import InvalidRequest, UnsupportedModel
from overfill.making import build
from overfill.making.build import SCORES_FILE, build_pair, shorten
from overfill.making.conversations import Conversation, Transcript
from overfill.making.fit import fit
from overfill.making.layerwise import PackedTranscripts
from overfill.making.prune import Scores, score
from overfill.making.recipe import DecoderRecipe, resolve_size
from overfill.making.sensitivity import Sensitivity, measure_sensitivity
from overfill.making.tiny import Architecture, make_tiny_pair
from overfill.model.config import ModelConfig
from overfill.model.digest import checkpoint_digest
from overfill.model.head import tokens_in_row_order
from overfill.model.loading import Weights, load_weights
from overfill.model.pair_files import load_whole

CHATS = [
    Conversation(
        (
            {"role": "user", "content": f"What is {n} + {n}?"},
            {
                "role": "assistant",
                "content": f"The answer to your question, {n} + {n}, is {2 * n}. Please write it.",
            },
        )
    )
    for n in range(40)
]


@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen2", "qwen3"])
def test_a_built_decoder_runs_in_plain_transformers(architecture: Architecture, tmp_path: Path) -> None:
    full = make_tiny_pair(tmp_path / "tiny", architecture=architecture, identity=True) / "full"
    recipe = DecoderRecipe(hidden_size=50, intermediate_size=0.5, layers=3)
    pair = build_pair(full, tmp_path / "built", recipe, CHATS)
    config = pair.decoder_config
    assert (config.hidden_size, config.intermediate_size, config.num_layers) == (50, 64, 3)
    assert len(pair.layer_map) == 3
    assert (config.num_heads, config.num_kv_heads, config.head_dim) == (4, 2, 16)
    assert pair.recipe["fit"] == "least-squares"
    assert pair.recipe["fitted_on_answer_tokens"] > 500
    decoder = AutoModelForCausalLM.from_pretrained(pair.decoder_path)
    assert decoder(torch.tensor([[5, 6, 7]])).logits.isfinite().all()
    scores = Scores.load(pair.folder / SCORES_FILE, checkpoint_digest(full))
    assert scores is not None
    assert scores.neurons.shape == (4, 128)
    load_whole(pair.folder, digests=True)


def test_the_type_of_the_elements_stays(tmp_path: Path, tiny_pair: Path) -> None:
    full = tmp_path / "bf16"
    model = AutoModelForCausalLM.from_pretrained(tiny_pair / "full", dtype=torch.bfloat16)
    model.save_pretrained(full)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        if (tiny_pair / "full" / name).exists():
            (full / name).write_bytes((tiny_pair / "full" / name).read_bytes())
    pair = build_pair(full, tmp_path / "built", DecoderRecipe(intermediate_size=64, fit="none"), CHATS)
    assert AutoModelForCausalLM.from_pretrained(pair.decoder_path, dtype="auto").dtype == torch.bfloat16


def test_a_decoder_of_full_size_is_the_full_model(tiny_pair: Path, tmp_path: Path) -> None:
    assert build_pair(tiny_pair / "full", tmp_path / "plain", DecoderRecipe(), []).identity
    quantised = build_pair(tiny_pair / "full", tmp_path / "int8", DecoderRecipe(quantize="int8"), [])
    assert quantised.quantize == "int8"
    assert quantised.decoder_path == quantised.full_path


@pytest.mark.parametrize(
    "recipe", [DecoderRecipe(), DecoderRecipe(quantize="int8"), DecoderRecipe(intermediate_size=64)]
)
def test_a_full_model_that_is_stored_quantised_is_refused(
    recipe: DecoderRecipe, tiny_pair: Path, tmp_path: Path
) -> None:
    full = tmp_path / "full"
    shutil.copytree(tiny_pair / "full", full)
    edit(full / "config.json", lambda config: config.update(quantization_config={"quant_method": "fp8"}))
    with pytest.raises(UnsupportedModel, match="the weights are stored in fp8"):
        build_pair(full, tmp_path / "built", recipe, CHATS)
    assert not (tmp_path / "built").exists()


def test_a_failed_build_leaves_nothing(tiny_pair: Path, tmp_path: Path) -> None:
    out = tmp_path / "built"
    for recipe, chats, message in (
        (DecoderRecipe(intermediate_size=129), CHATS, r"intermediate_size: must be in 1\.\.128"),
        (DecoderRecipe(intermediate_size=64), [], "calibration: holds no answers"),
        (DecoderRecipe(intermediate_size=64), CHATS[:2], "calibration: has .* answer tokens"),
    ):
        with pytest.raises(InvalidRequest, match=message):
            build_pair(tiny_pair / "full", out, recipe, chats)
    assert [f.name for f in tmp_path.iterdir()] == []


class FitFailed(Exception):
    pass


def fail(*_: object) -> Weights:
    raise FitFailed


def test_scores_outlive_a_build_that_fails_after_them(
    tiny_pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full, out, recipe = tiny_pair / "full", tmp_path / "built", DecoderRecipe(intermediate_size=64)
    scored: list[int] = []

    def count(*arguments: Any) -> Scores:
        scored.append(len(arguments[2].answers))
        return score(*arguments)

    monkeypatch.setattr(build, "score", count)
    with monkeypatch.context() as patch:
        patch.setattr(build, "fit", fail)
        with pytest.raises(FitFailed):
            build_pair(full, out, recipe, CHATS)
    assert [file.name for file in tmp_path.iterdir()] == ["built.scores.safetensors"]
    kept = (tmp_path / "built.scores.safetensors").read_bytes()

    steps: list[str] = []
    pair = build_pair(full, out, recipe, CHATS, report=lambda step, done, total: steps.append(step))
    assert len(scored) == 1
    assert f"Using the scores in {tmp_path}/built.scores.safetensors" in steps
    assert [file.name for file in tmp_path.iterdir()] == ["built"]
    assert pair.decoder_digest == build_pair(full, tmp_path / "again", recipe, CHATS).decoder_digest
    assert len(scored) == 2

    # Scores of other text, or of another full model, are measured again.
    other = make_tiny_pair(tmp_path / "other", identity=True, seed=1) / "full"
    for model, chats in ((full, CHATS[:-1]), (other, CHATS)):
        (tmp_path / "next.scores.safetensors").write_bytes(kept)
        before = len(scored)
        build_pair(model, tmp_path / "next", recipe, chats)
        assert len(scored) == before + 1


def test_long_transcripts_are_cut_for_scoring_only(
    tiny_pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One pass of scoring holds all activations of a transcript; fitting holds those of one layer."""
    monkeypatch.setattr(build, "SCORED_TRANSCRIPT_TOKENS", 200)
    longest: dict[str, int] = {}

    def note(name: str, packed: PackedTranscripts) -> None:
        longest[name] = max(int(packed.positions.max()) + 1, longest.get(name, 0))

    def sensitivity(*arguments: Any) -> Sensitivity:
        note("sensitivity", arguments[2])
        return measure_sensitivity(*arguments)

    def fitted(*arguments: Any) -> Weights:
        note("fit", arguments[3])
        return fit(*arguments)

    monkeypatch.setattr(build, "measure_sensitivity", sensitivity)
    monkeypatch.setattr(build, "fit", fitted)
    question, answer = CHATS[0].messages
    long = Conversation(({**question, "content": "Please explain how this works. " * 40}, answer))
    build_pair(tiny_pair / "full", tmp_path / "built", DecoderRecipe(intermediate_size=64), [long, *CHATS])
    assert longest["sensitivity"] == 200
    assert longest["fit"] > 390


@pytest.mark.parametrize(
    ("tokens", "answer_start", "expected"),
    [(9, 4, Transcript((2, 3, 4, 5, 6, 7, 8), 2)), (7, 4, Transcript((0, 1, 2, 3, 4, 5, 6), 4)),
     (20, 2, Transcript((1, 2, 3, 4, 5, 6, 7), 1)), (9, 0, Transcript((0, 1, 2, 3, 4, 5, 6), 0))],
)  # fmt: skip
def test_a_long_prompt_loses_its_beginning_and_a_long_answer_its_end(
    tokens: int, answer_start: int, expected: Transcript
) -> None:
    assert shorten([Transcript(tuple(range(tokens)), answer_start)], 7) == [expected]


@pytest.mark.parametrize(
    ("size", "expected"), [(100, 100), (1.0, 1536), (0.5, 768), (0.55, 832), (0.001, 64), (0.99, 1536)]
)
def test_shares_become_multiples_of_64_and_numbers_stay(size: int | float, expected: int) -> None:
    assert resolve_size("intermediate_size", size, 1536) == expected


@pytest.mark.parametrize("size", [0, 1537, 0.0, 1.5, -1])
def test_sizes_that_do_not_fit_are_refused(size: int | float) -> None:
    with pytest.raises(InvalidRequest, match="hidden_size"):
        resolve_size("hidden_size", size, 1536)


def test_the_config_says_what_changed_and_nothing_else(tiny_pair: Path, tmp_path: Path) -> None:
    pair = build_pair(tiny_pair / "full", tmp_path / "built", DecoderRecipe(intermediate_size=64, fit="none"), CHATS)
    before, after = (json.loads((f / "config.json").read_text()) for f in (pair.full_path, pair.decoder_path))
    assert after == before | {"intermediate_size": 64}
    assert ModelConfig.load(pair.decoder_path).eos_token_ids == pair.full_config.eos_token_ids


@pytest.mark.parametrize("fit", ["least-squares", "none"])
def test_a_head_in_two_parts_is_an_ordinary_one_to_plain_transformers(fit: str, tmp_path: Path) -> None:
    """End-of-sequence tokens keep their rows; the engine reads the two parts and computes the same."""
    full = make_tiny_pair(tmp_path / "tiny", identity=True) / "full"
    vocab = ModelConfig.load(full).vocab_size
    whole, lowered = (
        build_pair(full, tmp_path / name, DecoderRecipe(intermediate_size=64, fit=fit, **head), CHATS)
        for name, head in (("whole", {}), ("lowered", {"head_tokens": 128, "tail_rank": 9}))
    )
    config = lowered.decoder_config
    assert (config.head_tokens, config.tail_rank, config.vocab_size) == (128, 9, vocab)
    rows = [AutoModelForCausalLM.from_pretrained(p.decoder_path).lm_head.weight.detach() for p in (whole, lowered)]
    kept = tokens_in_row_order(vocab, config.head_mask)[:128]
    assert set(config.eos_token_ids) < set(kept.tolist())
    torch.testing.assert_close(rows[1][kept], rows[0][kept], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(rows[1], rows[0], atol=1e-3)

    weights = load_weights(lowered.decoder_path, config, torch.float32, torch.device("cpu"))
    assert weights.tail is not None
    ours = torch.cat([weights.head, weights.tail.left @ weights.tail.right])[weights.tail.row_index]
    torch.testing.assert_close(ours, rows[1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rank", [0, 64])
def test_a_rank_that_does_not_fit_is_refused(rank: int, tiny_pair: Path) -> None:
    with pytest.raises(InvalidRequest, match="tail_rank"):
        DecoderRecipe(intermediate_size=64, head_tokens=128, tail_rank=rank).check(tiny_pair / "full")


def test_a_decoder_with_such_a_head_is_no_full_model(tiny_pair: Path, tmp_path: Path) -> None:
    recipe = DecoderRecipe(intermediate_size=64, head_tokens=128, tail_rank=9)
    built = build_pair(tiny_pair / "full", tmp_path / "built", recipe, CHATS)
    with pytest.raises(UnsupportedModel, match="head in two parts"):
        build_pair(built.decoder_path, tmp_path / "again", DecoderRecipe(intermediate_size=32), CHATS)

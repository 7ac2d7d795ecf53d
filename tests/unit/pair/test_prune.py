from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from overfill.errors import InvalidPair
from overfill.pair.build import build_pair
from overfill.pair.calibrate import packaged_prompts, write_answers
from overfill.pair.manifest import Pair
from overfill.pair.plain import load_plain
from overfill.pair.prune import Scores, Transcript, score_mlp, slice_mlp
from overfill.testing.tiny import make_tiny_pair

TOKENS = torch.randint(2, 512, (2, 20), generator=torch.Generator().manual_seed(0))


def sliced(full: Path, scores: Scores, size: int, out: Path) -> Path:
    out.mkdir()
    slice_mlp(full, scores, size, out)
    return out


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_pruned_model_is_the_full_one_without_the_dropped_neurons(architecture: str, tmp_path: Path) -> None:
    full = make_tiny_pair(tmp_path / "pair", architecture=architecture, identity=True) / "full"  # type: ignore[arg-type]
    scores = Scores(torch.rand(4, 128, generator=torch.Generator().manual_seed(3)))
    decoder = AutoModelForCausalLM.from_pretrained(sliced(full, scores, 40, tmp_path / "decoder"))
    model = AutoModelForCausalLM.from_pretrained(full)
    with torch.inference_mode():
        unpruned = model(TOKENS).logits
        for layer, values in zip(model.model.layers, scores.values, strict=True):
            dropped = values.argsort(descending=True)[40:]
            layer.mlp.down_proj.weight[:, dropped] = 0
        torch.testing.assert_close(decoder(TOKENS).logits, model(TOKENS).logits, rtol=0, atol=1e-4)
    assert not torch.allclose(decoder(TOKENS).logits, unpruned, atol=0.1)


def test_the_checkpoint_is_complete_and_otherwise_unchanged(tiny: Path, tmp_path: Path) -> None:
    out = sliced(tiny / "full", Scores(torch.rand(4, 128)), 32, tmp_path / "decoder")
    assert {f.name for f in out.iterdir()} == {f.name for f in (tiny / "full").iterdir()}
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (tiny / "full", out))
    assert after == before | {"intermediate_size": 32}


def test_keeping_every_neuron_changes_nothing(tiny: Path, tmp_path: Path) -> None:
    out = sliced(tiny / "full", Scores(torch.rand(4, 128)), 128, tmp_path / "decoder")
    assert (out / "model.safetensors").read_bytes() == (tiny / "full" / "model.safetensors").read_bytes()


def test_scores_are_activation_times_column_norm_over_answer_positions(tiny: Path) -> None:
    batch = [Transcript(tuple(TOKENS[0].tolist()), 5), Transcript(tuple(TOKENS[1, :12].tolist()), 9)]
    scores = score_mlp(tiny / "full", [batch])

    model = load_plain(tiny / "full")
    seen: list[torch.Tensor] = []
    projection = model.model.layers[2].mlp.down_proj
    projection.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0][0]))
    with torch.inference_mode():
        for transcript in batch:
            model(torch.tensor([transcript.token_ids]))
        activations = torch.cat([seen[0][5:], seen[1][9:]])
        expected = activations.abs().mean(0) * projection.weight.norm(dim=0)
    torch.testing.assert_close(scores.values[2], expected)


def test_scores_survive_saving(tmp_path: Path) -> None:
    scores = Scores(torch.rand(4, 128))
    scores.save(tmp_path / "scores.safetensors")
    assert torch.equal(Scores.load(tmp_path / "scores.safetensors").values, scores.values)
    with pytest.raises(InvalidPair, match=r"none\.safetensors"):
        Scores.load(tmp_path / "none.safetensors")


@pytest.mark.parametrize("size", [0, 129])
def test_an_impossible_size_is_refused(size: int, tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidPair, match=r"1\.\.128"):
        slice_mlp(tiny / "full", Scores(torch.rand(4, 128)), size, tmp_path)


def test_scores_of_another_model_are_refused(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidPair, match="needs"):
        slice_mlp(tiny / "full", Scores(torch.rand(4, 127)), 8, tmp_path)


def test_calibration_answers_are_the_models_own_and_repeatable(tiny: Path) -> None:
    prompts = packaged_prompts()[:5]

    def answer(seed: int) -> list[list[Transcript]]:
        return write_answers(tiny / "full", prompts, max_tokens=6, batch_size=2, seed=seed)

    batches = answer(0)
    assert [len(batch) for batch in batches] == [2, 2, 1]
    assert all(1 <= len(t.token_ids) - t.answer_start <= 6 for batch in batches for t in batch)
    assert answer(0) == batches
    assert answer(1) != batches


def test_build_makes_a_pair_with_its_scores(tiny: Path, tmp_path: Path) -> None:
    pair = build_pair(tiny / "full", tmp_path / "built", 48)
    assert pair.decoder_config.intermediate_size == 48
    assert pair.full_digest == Pair.load(tiny).full_digest
    assert (pair.folder / "full").is_symlink()
    assert Scores.load(pair.folder / "scores.safetensors").values.shape == (4, 128)
    assert Pair.load(pair.folder, check_digests=True) == pair


def test_a_build_that_fails_leaves_nothing(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh: Callable[[], Path]
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("overfill.pair.build.write_manifest", fail)
    out = tmp_path / "pairs" / "built"
    with pytest.raises(KeyboardInterrupt):
        build_pair(tiny / "full", out, 128)
    assert list(out.parent.iterdir()) == []

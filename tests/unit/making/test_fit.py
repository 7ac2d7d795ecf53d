from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from overfill.errors import InvalidPair
from overfill.making.conversations import Transcript
from overfill.making.fit import fit
from overfill.making.layerwise import (
    LayerMath,
    PackedTranscripts,
    attend_answers,
    fold_norms,
    prompt_kv,
    run_full_layer,
)
from overfill.making.prune import PruningPlan, Scores, make_pruning_plan, score, slice_weights
from overfill.making.ridge import Ridge
from overfill.making.sensitivity import measure_sensitivity
from overfill.making.tiny import Architecture, make_tiny_pair
from overfill.model.config import ModelConfig
from overfill.model.loading import Weights, load_weights


def transcripts(count: int, seed: int = 0) -> list[Transcript]:
    generator = torch.Generator().manual_seed(seed)
    return [Transcript(tuple(torch.randint(2, 512, (60,), generator=generator).tolist()), 10) for _ in range(count)]


@pytest.fixture(scope="module")
def full(tiny_pair: Path) -> tuple[Weights, ModelConfig]:
    config = ModelConfig.load(tiny_pair / "full")
    return fold_norms(load_weights(tiny_pair / "full", config, torch.float32, torch.device("cpu"))), config


def plan(full: tuple[Weights, ModelConfig], packed: PackedTranscripts, **sizes: int) -> PruningPlan:
    chosen = {"hidden_size": 64, "intermediate_size": 128} | sizes
    return make_pruning_plan(scores(full, packed), **chosen, layers=range(full[1].num_layers), method="rotate")


def scores(full: tuple[Weights, ModelConfig], packed: PackedTranscripts) -> Scores:
    return score(*full, packed, measure_sensitivity(*full, packed))


def stream_error(
    full: tuple[Weights, ModelConfig], decoder: Weights, basis: torch.Tensor, packed: PackedTranscripts
) -> float:
    """Mean square of the difference between the last residual streams of the full model and the decoder."""
    weights, config = full
    math = LayerMath(config, 64)
    theirs = weights.embedding[packed.token_ids]
    ours = decoder.embedding[packed.token_ids[packed.answers]]
    for wide, narrow in zip(weights.layers, decoder.layers, strict=True):
        prompts = []
        for part in packed.parts:
            done = run_full_layer(math, wide, packed, part, theirs[part.rows])
            theirs[part.rows] = done.out
            prompts += prompt_kv(done, part)
        ours = ours + attend_answers(math, narrow, packed, ours, prompts) @ narrow.o.T
        ours = ours + math.neurons(narrow, math.norm(ours)) @ narrow.down.T
    return float((theirs[packed.answers] @ basis - ours).square().mean())


@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen2", "qwen3"])
def test_a_decoder_of_full_size_stays_the_full_model(architecture: Architecture, tmp_path: Path) -> None:
    folder = make_tiny_pair(tmp_path, architecture=architecture, identity=True) / "full"
    config = ModelConfig.load(folder)
    weights = fold_norms(load_weights(folder, config, torch.float32, torch.device("cpu")))
    packed = PackedTranscripts.of(transcripts(8), rows_at_once=130)
    fitted = fit(weights, config, plan((weights, config), packed), packed)
    for ours, theirs in zip(fitted.layers, weights.layers, strict=True):
        for name in ("qkv", "o", "gate_up", "down"):
            torch.testing.assert_close(getattr(ours, name), getattr(theirs, name), rtol=0, atol=1e-4)
    torch.testing.assert_close(fitted.head, weights.head, rtol=0, atol=1e-4)


def test_fitting_brings_the_residual_stream_closer_on_text_it_has_not_seen(full: tuple[Weights, ModelConfig]) -> None:
    packed, unseen = PackedTranscripts.of(transcripts(60)), PackedTranscripts.of(transcripts(8, seed=1))
    smaller = plan(full, packed, hidden_size=56, intermediate_size=64)
    fitted = stream_error(full, fit(*full, smaller, packed), smaller.basis, unseen)
    assert fitted < 0.9 * stream_error(full, slice_weights(full[0], smaller), smaller.basis, unseen)


def test_how_transcripts_are_packed_changes_nothing(full: tuple[Weights, ModelConfig]) -> None:
    text = transcripts(8)
    smaller = plan(full, PackedTranscripts.of(text), intermediate_size=64)
    one, many = (fit(*full, smaller, PackedTranscripts.of(text, rows_at_once=rows)) for rows in (10_000, 60))
    torch.testing.assert_close(one.head, many.head, rtol=1e-3, atol=1e-3)


def test_layers_that_are_left_out_are_made_up_for(full: tuple[Weights, ModelConfig]) -> None:
    packed = PackedTranscripts.of(transcripts(60))
    kept = make_pruning_plan(
        scores(full, packed), hidden_size=64, intermediate_size=128, layers=[0, 1, 3], method="rotate"
    )
    decoder = fit(*full, kept, packed)
    assert len(decoder.layers) == 3
    # The layer before the gap writes more than before, because it replaces the missing one.
    assert not torch.allclose(decoder.layers[1].down, full[0].layers[1].down, atol=1e-2)
    torch.testing.assert_close(decoder.layers[0].down, full[0].layers[0].down, rtol=0, atol=1e-3)


def test_a_layer_that_cannot_be_fitted_is_named(full: tuple[Weights, ModelConfig]) -> None:
    weights, config = full
    packed = PackedTranscripts.of(transcripts(8))
    good = plan(full, packed)
    layers = list(weights.layers)
    layers[2] = replace(layers[2], down=torch.full_like(layers[2].down, torch.nan))
    with pytest.raises(InvalidPair, match="layer 2: down"):
        fit(replace(weights, layers=tuple(layers)), config, good, packed)


@pytest.mark.parametrize("rows", [1, 7, 100])
def test_ridge_regression_is_the_least_squares_solution(rows: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x, y, start = (torch.randn(*shape, generator=generator) for shape in ((100, 5), (100, 3), (3, 5)))
    ridge = Ridge(5, 3)
    for i in range(0, 100, rows):
        ridge.add(x[i : i + rows], y[i : i + rows])
    expected = torch.linalg.lstsq(x, y).solution.T
    torch.testing.assert_close(ridge.solve(start, 1e-7), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ridge.solve(start, 1e9), start, rtol=1e-4, atol=1e-4)

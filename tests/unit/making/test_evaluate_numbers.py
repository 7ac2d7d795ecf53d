"""Figures that need no model: means by position, repetition, costs, rounding."""

from __future__ import annotations

import math

import pytest
import torch

from overfill.making.evaluate.costs import DecodeCost, weight_bytes
from overfill.making.evaluate.examples import choose_examples
from overfill.making.evaluate.fake_quantization import fake_quantize
from overfill.making.evaluate.free_running import ScoredAnswer, repeats
from overfill.making.evaluate.token_metrics import MetricAccumulator
from overfill.model.config import ModelConfig

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 1000,
    "hidden_size": 96,
    "intermediate_size": 200,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}


def test_positions_fall_into_buckets_of_powers_of_two() -> None:
    accumulator = MetricAccumulator()
    accumulator.add([10.0, 1.0, 2.0, 4.0, 5.0], 0)
    accumulator.add([3.0, 5.0], 2)
    metric = accumulator.metric()
    found = [(b.first, b.last, b.estimate.count, b.estimate.mean) for b in metric.by_position]
    assert found == [(0, 0, 1, 10.0), (1, 1, 1, 1.0), (2, 3, 4, 3.5), (4, 7, 1, 5.0)]
    assert metric.overall.count == 7
    assert metric.overall.mean == pytest.approx(30 / 7)


def test_the_standard_error_is_over_answers() -> None:
    accumulator = MetricAccumulator()
    for value in (1.0, 2.0, 3.0, 6.0):
        accumulator.add([value] * 5, 1)
    overall = accumulator.metric().overall
    deviation = torch.tensor([1.0, 2.0, 3.0, 6.0]).std().item()
    assert overall.standard_error == pytest.approx(deviation / math.sqrt(4))


def test_one_answer_has_no_error_and_none_has_no_mean() -> None:
    accumulator = MetricAccumulator()
    assert math.isnan(accumulator.metric().overall.mean)
    assert accumulator.metric().to_json()["mean"] is None
    accumulator.add([1.0, 3.0], 1)
    assert (accumulator.metric().overall.mean, accumulator.metric().overall.standard_error) == (2.0, 0.0)


def test_repeated_grams_are_those_seen_before_in_the_answer() -> None:
    assert repeats([1, 2, 3, 4, 1, 2, 3, 4, 5]) == [0, 0, 0, 0, 1, 0]
    assert repeats([7, 7, 7, 7, 7, 7]) == [0, 1, 1]
    assert repeats([1, 2, 3]) == []


def test_figures_are_split_by_kind() -> None:
    accumulator = MetricAccumulator()
    for kind, values in (("long", [1.0, 3.0]), ("short", [5.0]), ("long", [5.0])):
        accumulator.add(values, 0, kind)
    metric = accumulator.metric()
    assert [(kind, e.mean, e.count) for kind, e in metric.by_kind] == [("long", 3.0, 3), ("short", 5.0, 1)]
    assert (metric.of_kind("long").mean, metric.overall.mean) == (3.0, 3.5)
    assert math.isnan(metric.of_kind("other").mean)
    assert list(metric.to_json()["by_kind"]) == ["long", "short"]
    accumulator = MetricAccumulator()
    accumulator.add([1.0], 0)
    assert accumulator.metric().by_kind == ()


def _answer(nll: float, repeated: float) -> ScoredAnswer:
    return ScoredAnswer((1, 2), "a text", True, nll, repeated)


def test_three_examples_are_the_median_the_most_repetitive_and_the_least_likely() -> None:
    figures = [(1.0, 0.0), (0.5, 0.9), (9.0, 0.0), (2.0, 0.1), (3.0, 0.2), (1.5, 0.0)]
    chosen = choose_examples([_answer(*each) for each in figures], 3)
    # Without index 2 and index 1, the likelihoods of indices 0, 5, 3 and 4 are left.
    assert [(e.index, e.why) for e in chosen] == [(3, "median"), (1, "most repetitive"), (2, "least likely")]


def test_more_examples_are_at_evenly_spaced_ranks_and_none_is_shown_twice() -> None:
    answers = [_answer(float(i), i / 100) for i in range(22)]
    chosen = choose_examples(answers, 10)
    assert [e.index for e in chosen] == [1, 3, 6, 8, 11, 13, 16, 18, 20, 21]
    assert chosen[0].why == "rank 2 of 20"
    assert sorted(e.index for e in choose_examples(answers[:4], 10)) == [0, 1, 2, 3]


def test_an_empty_answer_is_the_least_likely_one() -> None:
    empty = ScoredAnswer((), "", True, math.nan, 0.0)
    assert choose_examples([_answer(1.0, 0.0), empty, _answer(9.0, 0.0)], 3)[-1].index == 1


def test_a_decode_step_reads_all_matrices_and_the_head_but_not_the_embedding() -> None:
    config = ModelConfig.from_dict(CONFIG)
    layer = 96 * (6 + 2 * 2) * 16 + 96 * 96 + 3 * 96 * 200
    weights = 3 * layer + 1000 * 96
    untied = ModelConfig.from_dict({**CONFIG, "tie_word_embeddings": False})
    assert DecodeCost.of(config, "bf16") == DecodeCost(weights, 2 * weights, 2 * weights)
    assert [weight_bytes(config, "none", dtype) for dtype in ("bfloat16", "float32")] == [2 * weights, 4 * weights]
    assert weight_bytes(config, "int8", "bfloat16") == DecodeCost.of(config, "int8").bytes
    assert DecodeCost.of(untied, "bf16") == DecodeCost.of(config, "bf16")


def test_quantised_bytes_include_scales() -> None:
    config = ModelConfig.from_dict({**CONFIG, "num_hidden_layers": 1})
    rows = (6 + 4) * 16 + 96 + 400 + 96 + 1000
    weights = DecodeCost.of(config, "int8").weights
    assert DecodeCost.of(config, "int8").bytes == weights + 4 * rows
    # 96 inputs make three groups, 200 make seven.
    assert DecodeCost.of(config, "int4").bytes == 20 * (3 * (rows - 96) + 7 * 96)
    assert DecodeCost.of(config, "int4+int8 head").bytes == 20 * (3 * (rows - 1096) + 7 * 96) + 1000 * 100


@pytest.mark.parametrize(("precision", "levels"), [("int8", 255), ("int4", 16)])
@pytest.mark.parametrize("columns", [64, 40])
def test_rounding_errs_by_half_a_step_at_most(precision: str, levels: int, columns: int) -> None:
    matrix = torch.randn(8, columns, generator=torch.Generator().manual_seed(0))
    rounded = fake_quantize(matrix, precision)  # type: ignore[arg-type]
    assert rounded.shape == matrix.shape
    groups = [slice(0, None)] if precision == "int8" else [slice(i, i + 32) for i in range(0, columns, 32)]
    for group in groups:
        part = matrix[:, group]
        step = (2 * part.abs().amax(1) if precision == "int8" else part.amax(1) - part.amin(1)) / (levels - 1)
        error = (rounded[:, group] - part).abs().amax(1)
        assert (error <= 0.51 * step + 1e-3).all()
        assert (error > 0.1 * step).all()
        assert all(len(row.unique()) <= levels for row in rounded[:, group])


def test_int4_of_a_4_bit_matrix_is_lossless() -> None:
    steps = torch.randint(0, 16, (4, 2, 32), generator=torch.Generator().manual_seed(1)).float()
    steps[..., 0], steps[..., 1] = 0, 15
    matrix = (steps * 0.125 - 0.75).view(4, 64)
    assert torch.equal(fake_quantize(matrix, "int4"), matrix)


def test_a_constant_group_stays() -> None:
    matrix = torch.full((2, 32), 0.5)
    assert torch.equal(fake_quantize(matrix, "int4"), matrix)
    assert torch.equal(fake_quantize(torch.zeros(2, 32), "int8"), torch.zeros(2, 32))

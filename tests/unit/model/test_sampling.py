"""Tests that tokens are drawn from the requested distribution, reproducibly, row by row."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import plain_race
import pytest
import torch
from transformers import (
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from overfill.errors import InternalError
from overfill.model import sampling
from overfill.model.sampling import kept, race_keys
from overfill.model.sampling import sample as sample_rows
from overfill.model.steps import SampledToken
from overfill.request.params import SamplingParams

GREEDY = SamplingParams(temperature=0)


def sample(
    logits: torch.Tensor, params: Sequence[SamplingParams], positions: Sequence[int], sample_indices: Sequence[int]
) -> list[SampledToken]:
    tokens, failed = sample_rows(logits, params, positions, sample_indices)
    assert not failed
    return tokens


def draw(logits: torch.Tensor, params: SamplingParams, n: int) -> list[int]:
    """Draws ``n`` tokens from one row, at positions 0 to n - 1."""
    tokens = sample(logits.expand(n, -1), [params] * n, range(n), [0] * n)
    return [token.token_id for token in tokens]


def hugging_face(logits: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """The distribution from which *generate* draws."""
    warpers = [TemperatureLogitsWarper(params.temperature)]
    if params.top_k is not None:
        warpers.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        warpers.append(TopPLogitsWarper(params.top_p))
    if params.min_p > 0:
        warpers.append(MinPLogitsWarper(params.min_p))
    for warper in warpers:
        logits = warper(torch.empty(0), logits)
    return logits.double().softmax(-1)


@pytest.fixture(params=["native", "reference"])
def each_implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs a test with native draws, and again with the reference's."""
    if request.param == "reference":
        monkeypatch.setattr(sampling, "draw", lambda *arguments: None)


FILTERS = [
    {},
    {"temperature": 0.3},
    {"temperature": 2.5},
    {"top_k": 1},
    {"top_k": 7},
    {"top_k": 10_000},
    {"top_p": 0.9},
    {"top_p": 0.05},
    {"top_p": 0.999},
    {"min_p": 0.1},
    {"min_p": 1.0},
    {"temperature": 0.7, "top_k": 40, "top_p": 0.8, "min_p": 0.05},
    {"temperature": 1.8, "top_k": 3, "top_p": 0.95},
    {"temperature": 1.8, "top_p": 0.95, "min_p": 0.2},
]


@pytest.mark.parametrize("spread", [0.1, 2.0, 8.0])
@pytest.mark.parametrize("options", FILTERS, ids=str)
def test_the_filters_leave_what_those_of_transformers_leave(options: dict, spread: float) -> None:
    logits = torch.randn(4, 300) * spread
    params = SamplingParams(**options)
    assert torch.equal(kept(logits, [params] * 4), hugging_face(logits, params) > 0)


def test_tokens_that_tie_with_the_kth_stay() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0, 2.0, 2.0, 0.0]])
    assert kept(logits, [SamplingParams(top_k=2)])[0].tolist() == [False, True, True, True, True, False]


def test_top_p_keeps_the_smallest_set_and_of_equal_tokens_the_first() -> None:
    logits = torch.tensor([[0.1, 0.2, 0.2, 0.2, 0.3]]).log()
    assert kept(logits, [SamplingParams(top_p=0.6)])[0].tolist() == [False, True, True, False, True]
    even = torch.zeros(1, 8)
    assert kept(even, [SamplingParams(top_p=0.5)])[0].tolist() == [True] * 4 + [False] * 4
    assert kept(even, [SamplingParams(top_p=0.5, min_p=1.0)])[0].tolist() == [True] * 4 + [False] * 4


@pytest.mark.parametrize("options", [{}, {"temperature": 0.6}, {"top_k": 3}, {"top_p": 0.8}, {"min_p": 0.3}])
def test_frequencies_follow_the_distribution(options: dict) -> None:
    n = 40_000
    logits = torch.tensor([[0.5, -1.0, 2.0, 1.5, 0.0, -3.0]])
    params = SamplingParams(**options, seed=1234)
    counts = np.bincount(draw(logits, params, n), minlength=6)
    expected = hugging_face(logits, params)[0].numpy() * n
    possible = expected > 0
    assert counts[~possible].sum() == 0
    chi_square = ((counts[possible] - expected[possible]) ** 2 / expected[possible]).sum()
    assert chi_square < 27.9  # 5 degrees of freedom: p < 4e-5 beyond


@pytest.mark.usefixtures("each_implementation")
def test_tokens_of_one_in_a_million_come_as_often_as_they_should() -> None:
    draws, part, tail = 1_000_000, 50_000, 20
    probabilities = torch.tensor([*[1e-6] * tail, 0.6, 0.25, 0.15 - 1e-3 - 1e-6 * tail, 1e-3], dtype=torch.float64)
    logits = probabilities.log().float().expand(part, -1).contiguous()
    params = [SamplingParams(seed=7)] * part
    counts = np.zeros(len(probabilities))
    for start in range(0, draws, part):
        tokens = sample(logits, params, range(start, start + part), [0] * part)
        counts += np.bincount([token.token_id for token in tokens], minlength=len(counts))
    expected = probabilities.numpy() * draws
    assert abs(counts[:tail].sum() - tail) < 4 * math.sqrt(tail)
    chi_square = ((counts[tail:] - expected[tail:]) ** 2 / expected[tail:]).sum()
    assert chi_square < 22.6  # about 3 degrees of freedom: p < 5e-5 beyond


@pytest.mark.usefixtures("each_implementation")
def test_known_draws() -> None:
    params, positions, sample_indices, tokens = plain_race.known_requests()
    logits = plain_race.LOGITS.expand(len(params), -1)
    assert [token.token_id for token in sample(logits, params, positions, sample_indices)] == tokens


def test_the_keys_are_those_of_the_definition() -> None:
    logits = torch.randn(1, 50) * 3
    logits[0, 7] = -torch.inf
    (keys,) = race_keys(logits, [SamplingParams(seed=2**63 + 9, temperature=0.7)], [40], [3]).tolist()
    greatest = logits.max().item()
    assert min(logits[0, :7].min(), logits[0, 8:].min()) > greatest - 26 * 0.7
    for token, key in enumerate(keys):
        luck = plain_race.luck(2**63 + 9, 40, 3, token)
        assert key == pytest.approx((logits[0, token].item() - greatest) / 0.7 + luck, abs=1e-5)


def test_the_most_extreme_words_give_finite_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "token_words", lambda *_: torch.tensor([[[0, 2**32 - 1, 2**31, 0]]]))
    keys = race_keys(torch.zeros(1, 3), [SamplingParams(seed=0)], [0], [0])[0].tolist()
    assert keys == pytest.approx([33 * math.log(2), -math.log(24 * math.log(2)), -math.log(math.log(2))], abs=1e-5)


def test_of_equal_keys_the_lowest_id_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "draw", lambda *arguments: None)
    monkeypatch.setattr(sampling, "token_words", lambda *_: torch.tensor([[[0, 9, 9, 9]]]))
    logits = torch.tensor([[-20.0, 1.0, 1.0, 1.0]])
    assert sample(logits, [SamplingParams(seed=0)], [0], [0])[0].token_id == 1


@pytest.mark.parametrize("options", [{}, {"top_p": 0.5}, {"top_k": 2}, {"min_p": 0.1}], ids=str)
@pytest.mark.usefixtures("each_implementation")
def test_a_token_of_minus_infinity_never_comes(options: dict) -> None:
    logits = torch.full((1, 1000), -torch.inf)
    logits[0, [300, 700]] = torch.tensor([1.0, 1.5])
    assert set(draw(logits, SamplingParams(seed=0, **options), 50)) <= {300, 700}


@pytest.mark.parametrize("noise", [1e-3, 1e-2])
def test_noise_in_the_logits_changes_few_draws(noise: float) -> None:
    n = 2000
    logits = torch.randn(n, 2000) * 3
    params = [SamplingParams(seed=3)] * n
    before, after = (
        torch.tensor([token.token_id for token in sample(row, params, range(n), [0] * n)])
        for row in (logits, logits + torch.randn_like(logits) * noise)
    )
    assert (before != after).float().mean() < 2 * noise


def test_a_draw_is_decided_by_seed_position_and_sample_index() -> None:
    logits = torch.zeros(1, 1000)

    def tokens(seed: int, sample_index: int) -> list[int]:
        rows = sample(logits.expand(8, -1), [SamplingParams(seed=seed)] * 8, range(8), [sample_index] * 8)
        return [row.token_id for row in rows]

    assert tokens(1, 0) == tokens(1, 0)
    assert len(set(tokens(1, 0))) > 4
    assert tokens(1, 0) != tokens(2, 0)
    assert tokens(1, 0) != tokens(1, 1)


def test_a_row_does_not_depend_on_its_batch() -> None:
    n = 60
    options = [
        {"temperature": 0},
        {"seed": 5},
        {"seed": 6, "top_k": 5, "logprobs": 2},
        {"seed": 7, "top_p": 0.9, "temperature": 1.5},
        {"seed": 8, "min_p": 0.1, "top_p": 0.4, "logprobs": 20},
        {"temperature": 0, "logprobs": 0},
    ]
    params = [SamplingParams(**options[row % len(options)]) for row in range(n)]
    logits = torch.randn(n, 500) * 4
    together = sample(logits, params, range(n), [0] * n)
    alone = [sample(logits[row : row + 1], [params[row]], [row], [0])[0] for row in range(n)]
    assert together == alone
    order = torch.randperm(n).tolist()
    shuffled = sample(logits[order], [params[row] for row in order], order, [0] * n)
    assert shuffled == [together[row] for row in order]


def test_an_extreme_temperature_is_no_more_than_greedy_or_uniform() -> None:
    logits = torch.tensor([[1.0, 90.0, 89.0]])
    assert set(draw(logits, SamplingParams(temperature=1e-300, seed=1), 20)) == {1}
    assert set(draw(logits, SamplingParams(temperature=1e30, seed=1), 60)) == {0, 1, 2}


def test_logprobs_are_those_of_the_model_before_temperature_and_filters() -> None:
    logits = torch.randn(3, 50) * 2
    params = [
        SamplingParams(temperature=3.0, top_k=5, seed=1, logprobs=4),
        SamplingParams(temperature=0, logprobs=0),
        SamplingParams(temperature=0, logprobs=20),
    ]
    want = logits.log_softmax(-1)
    for row, token in enumerate(sample(logits, params, [0] * 3, [0] * 3)):
        assert token.logprob == pytest.approx(want[row, token.token_id].item(), abs=1e-6)
        best = want[row].sort(descending=True)
        count = params[row].logprobs
        assert [i for i, _ in token.top] == best.indices[:count].tolist()
        assert [p for _, p in token.top] == pytest.approx(best.values[:count].tolist(), abs=1e-6)


def test_more_logprobs_than_tokens() -> None:
    (token,) = sample(torch.zeros(1, 3), [SamplingParams(temperature=0, logprobs=20)], [0], [0])
    assert [p for _, p in token.top] == pytest.approx([-math.log(3)] * 3)


@pytest.mark.parametrize("params", [GREEDY, SamplingParams(seed=1, top_k=3, top_p=0.5)], ids=["greedy", "drawn"])
@pytest.mark.parametrize("row", [[0.0, math.nan, 1.0], [0.0, math.inf, 1.0], [-math.inf] * 3, [math.nan] * 3])
@pytest.mark.usefixtures("each_implementation")
def test_broken_logits_yield_no_token_and_leave_their_neighbours_alone(
    row: list[float], params: SamplingParams
) -> None:
    logits = torch.tensor([row, [1.0, 2.0, 3.0], row])
    neighbour = replace(params, seed=5, logprobs=2)
    want = sample(logits[1:2], [neighbour], [7], [0])
    tokens, failed = sample_rows(logits, [replace(params, logprobs=3), neighbour, params], [7, 7, 7], [0, 0, 0])
    assert tokens[1] == want[0]
    assert sorted(failed) == [0, 2]
    assert all(isinstance(error, InternalError) for error in failed.values())


def test_a_row_to_be_drawn_needs_a_seed() -> None:
    with pytest.raises(ValueError, match=r"rows \[1\]"):
        sample(torch.zeros(2, 3), [GREEDY, SamplingParams()], [0, 0], [0, 0])

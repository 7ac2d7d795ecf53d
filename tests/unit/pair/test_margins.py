"""The judge of sampled tokens: it accepts every token that a small error of the logits explains, and no other."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from overfill.model.sampling import kept, race_keys
from overfill.pair.margins import TIE_MARGIN, judge_rows, kept_with_slack
from overfill.pair.reference import Verdict
from overfill.request.params import SamplingParams

ROWS = 1000
VOCAB = 64
POSITIONS = range(ROWS)
FILTERS = {
    "no filter": SamplingParams(seed=3),
    "hot": SamplingParams(temperature=3.0, seed=3),
    "top-k": SamplingParams(temperature=0.7, top_k=5, seed=3),
    "top-k of one": SamplingParams(top_k=1, seed=3),
    "top-p": SamplingParams(temperature=1.3, top_p=0.8, seed=3),
    "min-p": SamplingParams(temperature=1.5, min_p=0.1, seed=3),
    "all filters": SamplingParams(temperature=2.0, top_k=20, top_p=0.9, min_p=0.05, seed=3),
}
each_filter = pytest.mark.parametrize("sampling", FILTERS.values(), ids=FILTERS.keys())


def some_logits(rows: int = ROWS) -> Tensor:
    return 2 * torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(1))


def drawn(logits: Tensor, sampling: SamplingParams, sample_index: int = 0) -> Tensor:
    """The engines' choices. [N]"""
    rows = len(logits)
    return race_keys(logits, [sampling] * rows, POSITIONS[:rows], [sample_index] * rows).argmax(dim=-1)


def kinds(logits: Tensor, sampling: SamplingParams, tokens: Tensor) -> list[str]:
    chosen, margins = judge_rows(logits, sampling, POSITIONS[: len(logits)], 0)
    return [
        Verdict(0, int(token), int(best), float(row[token])).kind
        for token, best, row in zip(tokens, chosen, margins, strict=True)
    ]


@each_filter
def test_tokens_that_an_engine_draws_from_the_same_logits_are_identical(sampling: SamplingParams) -> None:
    assert kinds(some_logits(), sampling, drawn(some_logits(), sampling)) == ["identical"] * ROWS


@each_filter
def test_tokens_drawn_from_logits_that_differ_by_less_than_the_margin_are_ties(
    monkeypatch: pytest.MonkeyPatch, sampling: SamplingParams
) -> None:
    """The noise moves two logits apart by at most 0.98 of a margin that is so large that ties are frequent."""
    margin = 0.1
    monkeypatch.setattr("overfill.pair.margins.TIE_MARGIN", margin)
    noise = (torch.rand(ROWS, VOCAB, generator=torch.Generator().manual_seed(2)) - 0.5) * 0.98 * margin
    tokens = drawn(some_logits() + noise, sampling)
    chosen, margins = judge_rows(some_logits(), sampling, POSITIONS, 0)
    assert (margins.gather(1, tokens.unsqueeze(1)) <= margin).all()
    assert 0 < int((tokens != chosen).sum()) < 0.1 * ROWS


@each_filter
def test_tokens_of_a_wrong_draw_are_errors(sampling: SamplingParams) -> None:
    """A token that is not the reference's is never a mere tie, except by rare chance."""
    correct = drawn(some_logits(), sampling)
    for wrong in (
        drawn(some_logits(), replace(sampling, seed=4)),
        drawn(some_logits(), sampling, sample_index=1),
        drawn(some_logits() + 0.3 * torch.randn(ROWS, VOCAB, generator=torch.Generator().manual_seed(3)), sampling),
    ):
        differ = wrong != correct
        found = kinds(some_logits(), sampling, wrong)
        assert found.count("tie") <= 0.02 * ROWS
        if sampling.top_k != 1:  # with top-k of one there is nothing to draw
            assert found.count("error") >= 0.95 * int(differ.sum()) > 0


@pytest.mark.parametrize("name", ["top-k", "top-p", "min-p"])
def test_a_lost_filter_makes_errors(name: str) -> None:
    sampling = FILTERS[name]
    unfiltered = replace(sampling, top_k=None, top_p=1.0, min_p=0.0)
    assert "error" in kinds(some_logits(), sampling, drawn(some_logits(), unfiltered))


@pytest.mark.parametrize(("distance", "kind"), [(0.9, "tie"), (1.1, "error")])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_a_tie_is_within_a_thousandth_of_logit_of_the_greatest_key(
    temperature: float, distance: float, kind: str
) -> None:
    sampling = SamplingParams(temperature=temperature, seed=3)
    logits = some_logits(1)
    (noise,) = race_keys(torch.zeros_like(logits), [sampling], [0], [0])
    # The two tokens have the same key, and far greater ones than all others.
    logits[0] = -50.0
    logits[0, [4, 9]] = -temperature * noise[[4, 9]]
    logits[0, 9] -= distance * TIE_MARGIN
    assert kinds(logits, sampling, torch.tensor([4])) == ["identical"]
    assert kinds(logits, sampling, torch.tensor([9])) == [kind]


@pytest.mark.parametrize(("distance", "kind"), [(0.9, "tie"), (1.1, "error")])
@pytest.mark.parametrize("filters", [{"top_k": 2}, {"top_p": 0.6}, {"min_p": 0.9}], ids=str)
def test_a_token_that_a_filter_drops_by_less_than_a_thousandth_of_logit_is_a_tie(
    filters: dict[str, float], distance: float, kind: str
) -> None:
    """Of three tokens with nearly equal logits, each filter drops the last by a little. It would win the race."""
    logits = torch.full((1, VOCAB), -50.0)
    noise = race_keys(torch.zeros_like(logits), [SamplingParams(seed=3)], [0], [0])[0]
    last = int(noise.argmax())
    edge = math.log(filters["min_p"]) if "min_p" in filters else 0.0
    logits[0, [(last + 1) % VOCAB, (last + 2) % VOCAB, last]] = torch.tensor([0.0, 0.0, edge - distance * TIE_MARGIN])
    sampling = SamplingParams(seed=3, **filters)
    assert not kept_with_slack(logits, sampling, 0.0)[0, last]
    assert kinds(logits, SamplingParams(seed=3), torch.tensor([last])) == ["identical"]
    assert kinds(logits, sampling, torch.tensor([last])) == [kind]


def test_the_next_token_is_a_tie_where_a_filter_barely_keeps_the_first() -> None:
    logits = torch.full((1, VOCAB), -50.0)
    noise = race_keys(torch.zeros_like(logits), [SamplingParams(seed=3)], [0], [0])[0]
    winner, second = (int(token) for token in noise.topk(2).indices)
    for distance, kind in ((0.9, "tie"), (1.1, "error")):
        # top-k keeps the first of the two that follow the largest logit.
        logits[0, [(winner + 1) % VOCAB, winner, second]] = torch.tensor([0.1, 0.0, -distance * TIE_MARGIN])
        sampling = SamplingParams(seed=3, top_k=2)
        others = [token for token in (winner, second, (winner + 1) % VOCAB) if token != winner]
        runner_up = max(others, key=lambda token: float(logits[0, token] + noise[token]))
        assert kinds(logits, sampling, torch.tensor([winner])) == ["identical"]
        assert kinds(logits, sampling, torch.tensor([runner_up])) == [kind]


@each_filter
def test_without_slack_the_filters_are_the_engines(sampling: SamplingParams) -> None:
    assert torch.equal(kept_with_slack(some_logits(), sampling, 0.0), kept(some_logits(), [sampling] * ROWS))


@each_filter
def test_more_slack_leaves_more_tokens(sampling: SamplingParams) -> None:
    masks = [kept_with_slack(some_logits(), sampling, slack) for slack in (-0.1, -0.01, 0.0, 0.01, 0.1)]
    for less, more in itertools.pairwise(masks):
        assert not (less & ~more).any()
    assert (masks[-1] & ~masks[0]).any() == (sampling.top_k is not None or sampling.top_p < 1 or sampling.min_p > 0)


def test_greedy_margins_are_distances_from_the_largest_logit() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.5]])
    chosen, margins = judge_rows(logits, SamplingParams(temperature=0), [7], 0)
    assert chosen.tolist() == [1]
    assert margins.tolist() == [[2.0, 0.0, 0.5]]

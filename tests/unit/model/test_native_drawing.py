"""Compares native draws with the reference in ``model.sampling``, which test_sampling.py compares with transformers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from overfill.model import sampling
from overfill.model.native import library
from overfill.model.native.drawing import draw
from overfill.request.params import SamplingParams

pytestmark = pytest.mark.skipif(
    library.unavailable_reason() is not None, reason=f"no native kernels: {library.unavailable_reason()}"
)

FILTERS = [
    {},
    {"temperature": 0.3},
    {"temperature": 3.0},
    {"top_k": 1},
    {"top_k": 40},
    {"top_k": 900},
    {"top_k": 10_000_000},
    {"top_p": 0.9},
    {"top_p": 0.02},
    {"top_p": 0.999},
    {"min_p": 0.1},
    {"min_p": 1.0},
    {"temperature": 0.7, "top_k": 40, "top_p": 0.8, "min_p": 0.05},
    {"temperature": 1.8, "top_k": 300, "top_p": 0.95},
    {"temperature": 1.5, "top_p": 0.95, "min_p": 0.2},
]


def reference(logits: torch.Tensor, params: list[SamplingParams], u: np.ndarray) -> torch.Tensor:
    weights = sampling.filtered_weights(logits, params)
    return sampling._inverse_cdf(weights, torch.from_numpy(u))


@pytest.mark.parametrize("vocab", [3, 257, 5003])
@pytest.mark.parametrize("spread", [0.3, 4.0])
@pytest.mark.parametrize("options", FILTERS, ids=str)
def test_draws_are_those_of_the_reference(options: dict, spread: float, vocab: int) -> None:
    """They may differ only if ``u`` is within a float32 rounding of the boundary between two tokens."""
    torch.manual_seed(1)
    rows = 300
    logits = torch.randn(rows, vocab) * spread
    params = [SamplingParams(**options)] * rows
    u = np.random.default_rng(2).random(rows)
    torch.set_num_threads(2)
    differing = int((draw(logits, params, u) != reference(logits, params, u)).sum())
    torch.set_num_threads(1)
    assert differing <= 1


def test_of_equal_tokens_the_filters_keep_what_the_reference_keeps() -> None:
    logits = torch.tensor([1.0, 3.0, 2.0, 2.0, 2.0, 0.0] * 50).expand(200, -1)
    u = np.random.default_rng(2).random(200)  # not on one of the many boundaries
    for options in ({"top_k": 120}, {"top_p": 0.7}, {"top_p": 0.9, "top_k": 60}, {"min_p": 0.3}):
        params = [SamplingParams(**options)] * 200
        assert torch.equal(draw(logits, params, u), reference(logits, params, u)), options


@pytest.mark.parametrize("options", [{}, {"top_p": 0.5}, {"top_k": 2}, {"min_p": 0.1}])
@pytest.mark.parametrize("u", [0.0, 0.5, 1 - 2**-53])
def test_a_token_that_cannot_come_never_comes(options: dict, u: float) -> None:
    logits = torch.full((1, 1000), -torch.inf)
    logits[0, [300, 700]] = torch.tensor([1.0, 1.5])
    (token,) = draw(logits, [SamplingParams(**options)], np.array([u])).tolist()
    assert token in (300, 700)


def test_broken_rows_are_reported_and_the_others_drawn() -> None:
    logits = torch.zeros(4, 100)
    logits[1, 50], logits[2, 0], logits[3] = torch.nan, torch.inf, -torch.inf
    for options in ({}, {"top_p": 0.5}):
        tokens = draw(logits, [SamplingParams(**options)] * 4, np.full(4, 0.5)).tolist()
        assert tokens[0] >= 0
        assert tokens[1:] == [-1, -1, -1]

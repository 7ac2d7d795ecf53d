"""Compares native draws with the reference in ``model.sampling``, which test_sampling.py compares with transformers."""

from __future__ import annotations

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
    {"temperature": 1e30, "top_p": 0.5},
]


@pytest.mark.parametrize("vocab", [3, 257, 5003])
@pytest.mark.parametrize("spread", [0.3, 4.0, 20.0])
@pytest.mark.parametrize("options", FILTERS, ids=str)
def test_draws_are_those_of_the_reference(options: dict, spread: float, vocab: int) -> None:
    """They may differ only where two keys lie within 1e-5, which float32 does not tell apart."""
    torch.manual_seed(1)
    rows = 300
    logits = torch.randn(rows, vocab) * spread
    request = [SamplingParams(seed=2**63 + 5, **options)] * rows, range(rows), [7] * rows
    torch.set_num_threads(2)
    tokens = draw(logits, *request)
    torch.set_num_threads(1)
    keys = sampling.race_keys(logits, *request)
    assert (keys.gather(1, tokens.unsqueeze(1)).squeeze(1) >= keys.amax(dim=1) - 1e-5).all()


def test_of_equal_tokens_the_filters_keep_what_the_reference_keeps() -> None:
    logits = torch.tensor([1.0, 3.0, 2.0, 2.0, 2.0, 0.0] * 50).expand(200, -1)
    for options in ({"top_k": 120}, {"top_p": 0.7}, {"top_p": 0.9, "top_k": 60}, {"min_p": 0.3}, {"top_p": 1e-9}):
        request = [SamplingParams(seed=4, **options)] * 200, range(200), [0] * 200
        assert torch.equal(draw(logits, *request), sampling.race_keys(logits, *request).argmax(dim=1)), options


def test_broken_rows_are_reported_and_the_others_drawn() -> None:
    logits = torch.zeros(4, 100)
    logits[1, 50], logits[2, 0], logits[3] = torch.nan, torch.inf, -torch.inf
    for options in ({}, {"top_p": 0.5}):
        tokens = draw(logits, [SamplingParams(seed=0, **options)] * 4, range(4), [0] * 4).tolist()
        assert tokens[0] >= 0
        assert tokens[1:] == [-1, -1, -1]

"""Says how near each token is to being chosen from rows of logits, greedily or drawn.

The filters are written apart from those of ``overfill.model.sampling``, which the engines use. Here a filter has a
slack, because logits of two engines differ in their last bits: a token at a filter's edge may stay in one of them only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from overfill.model.sampling import race_keys
from overfill.request.params import SamplingParams

TIE_MARGIN = 1e-3
"""Largest margin, in logits, with which a token counts as a tie: batch shapes change the last bits."""


def judge_rows(
    logits: Tensor, sampling: SamplingParams, positions: Sequence[int], sample_index: int
) -> tuple[Tensor, Tensor]:
    """Chooses a token of each row, and measures how near every other token is to being chosen.

    The margin of a token is in logits. Greedy: the largest logit minus the token's. Drawn: the greatest key of the race
    minus the token's, times the temperature. The greatest key is among those tokens that the filters leave with
    ``TIE_MARGIN`` to spare. The margin is infinite where a filter drops the token by more than ``TIE_MARGIN``.

    Args:
        logits: [N, vocab] float32, after penalties, bias and grammar.
        sampling: of all rows; has a seed unless it is greedy.
        positions: position of the chosen token, per row.

    Returns:
        The chosen tokens, [N] int64; and the margins, [N, vocab] float32, at least 0.
    """
    if sampling.greedy:
        return logits.argmax(dim=-1), logits.amax(dim=-1, keepdim=True) - logits
    unfiltered = replace(sampling, top_k=None, top_p=1.0, min_p=0.0)
    rows = len(positions)
    keys = race_keys(logits, [unfiltered] * rows, positions, [sample_index] * rows)

    def greatest(slack: float) -> Tensor:
        return keys.masked_fill(~kept_with_slack(logits, sampling, slack), -math.inf)

    best = greatest(-TIE_MARGIN).amax(dim=-1, keepdim=True)
    margins = ((best - keys) * sampling.temperature).clamp_(min=0)
    return greatest(0).argmax(dim=-1), margins.masked_fill_(~kept_with_slack(logits, sampling, TIE_MARGIN), math.inf)


def kept_with_slack(logits: Tensor, sampling: SamplingParams, slack: float) -> Tensor:
    """Mask of the tokens that top-k, top-p and min-p leave, in this order.

    Args:
        logits: [N, vocab] float32.
        slack: in logits. With a positive one, a token stays if the filters leave it after some change that moves no two
            logits further apart or together than this. With a negative one, it stays if they leave it after every such
            change. With 0, tokens that tie at the edge of top-k or top-p all stay.

    Returns:
        [N, vocab] bool.
    """
    logits = logits.double()
    descending = logits.sort(dim=-1, descending=True).values
    # Number of tokens that are ahead of each; with a negative slack a token is ahead of itself.
    ahead = torch.searchsorted(-descending, -(logits + slack))
    itself = int(slack < 0)
    kept = torch.ones_like(logits, dtype=torch.bool)
    if sampling.top_k is not None:
        kept &= ahead - itself < sampling.top_k
    greatest = descending[:, :1]
    if sampling.top_p < 1:
        weights = torch.exp((logits - greatest) / sampling.temperature) * kept
        by_logit = weights.sort(dim=-1, descending=True).values
        mass = torch.cat([torch.zeros_like(greatest), by_logit.cumsum(dim=-1)], dim=-1)
        before, total = mass.gather(1, ahead) - itself * weights, mass[:, -1:]
        odds = sampling.top_p / (1 - sampling.top_p) * math.exp(slack / sampling.temperature)
        kept &= before < odds * (total - before)
    if sampling.min_p > 0:
        kept &= logits >= greatest + sampling.temperature * math.log(sampling.min_p) - slack
    return kept

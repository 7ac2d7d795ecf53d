"""Samples the next token of every row of logits.

A row's token depends on its logits, parameters, seed, position and sample index only, neither on the other rows nor on
earlier draws. This module does not know sequences or stop rules.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from overfill.errors import InternalError
from overfill.model.native.drawing import draw
from overfill.model.philox import uniform
from overfill.model.steps import SampledToken
from overfill.request.params import MAX_LOGPROBS, SamplingParams


def sample(
    logits: Tensor,
    params: Sequence[SamplingParams],
    positions: Sequence[int],
    sample_indices: Sequence[int],
) -> tuple[list[SampledToken], dict[int, Exception]]:
    """Samples one token per row.

    A greedy row gets the most likely token. Any other row draws ``u = Philox(seed; sample_index, position)`` and gets
    the first token, in id order, at which the cumulative filtered distribution exceeds ``u``.

    Args:
        logits: [N, vocab] float32.
        params: one per row.
        positions: position of the sampled token, per row.
        sample_indices: number of the answer among the request's answers, per row.

    Returns:
        A token per row; and row -> error for rows with NaN or +inf, or without a finite logit. The tokens of these
        rows are meaningless.

    Raises:
        ValueError: a row that is not greedy has no seed.
    """
    drawn = [row for row, p in enumerate(params) if not p.greedy]
    unseeded = [row for row in drawn if params[row].seed is None]
    if unseeded:
        raise ValueError(f"rows {unseeded} are sampled but have no seed")
    chosen = _most_likely(logits) if len(drawn) < len(params) else logits.new_empty(len(params), dtype=torch.int64)
    if drawn:
        rows = _rows([not p.greedy for p in params], logits.device)
        u = uniform(
            [params[row].seed or 0 for row in drawn],
            [sample_indices[row] for row in drawn],
            [positions[row] for row in drawn],
        )
        chosen[rows] = _draw(logits[rows], [params[row] for row in drawn], u)
    tokens = chosen.tolist()
    failed = non_finite_errors(tokens)
    requested = {row: p.logprobs for row, p in enumerate(params) if p.logprobs is not None and row not in failed}
    result = [SampledToken(token) for token in tokens]
    for row, scored in zip(requested, _logprobs(logits, chosen, requested), strict=True):
        result[row] = scored
    return result, failed


def non_finite_errors(tokens: Sequence[int]) -> dict[int, Exception]:
    """Row -> error for tokens of -1, which mark rows of logits that are not finite."""
    return {row: InternalError("the logits are not finite") for row, token in enumerate(tokens) if token < 0}


def _most_likely(logits: Tensor) -> Tensor:
    """The most likely token of each row, -1 for broken rows. [N] int64"""
    chosen = logits.argmax(dim=-1)  # the index of a NaN, if the row has one
    finite = logits.gather(1, chosen.unsqueeze(1)).squeeze(1).isfinite()
    return torch.where(finite, chosen, -1)


def _draw(logits: Tensor, params: Sequence[SamplingParams], u: NDArray[np.float64]) -> Tensor:
    """Draws a token for each row, -1 for rows whose logits are not finite. No row is greedy. [N] int64"""
    native = draw(logits, params, u)
    if native is not None:
        return native
    lost = _most_likely(logits) < 0
    # Broken rows become zeros, because the filters index by counts, which NaN would corrupt.
    weights = filtered_weights(logits.masked_fill(lost.unsqueeze(1), 0), params)
    tokens = _inverse_cdf(weights, torch.from_numpy(u).to(logits.device))
    return torch.where(lost, -1, tokens)


def filtered_weights(logits: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """Unnormalised probabilities after temperature, top-k, top-p and min-p, in this order.

    The rules are those of Hugging Face *generate*:

    - top-k keeps tokens that tie with the k-th.
    - top-p keeps the smallest set with at least that mass; among equal tokens, those with lower ids.
    - min-p compares with the most likely token, which always stays.

    Args:
        logits: [N, vocab] float32.
        params: one per row, none greedy.

    Returns:
        [N, vocab] float64: 0 for filtered tokens, 1 for the most likely one.
    """
    temperatures = _column([p.temperature for p in params], logits.device)
    weights = logits.double()  # changed in place below, because fresh memory costs more than the arithmetic
    weights.sub_(weights.amax(dim=-1, keepdim=True)).div_(temperatures).exp_()
    for drop, enabled in (
        (_below_top_k, [p.top_k is not None for p in params]),
        (_beyond_top_p, [p.top_p < 1 for p in params]),
        (_below_min_p, [p.min_p > 0 for p in params]),
    ):
        if any(enabled):
            rows = _rows(enabled, logits.device)
            part = weights[rows]
            dropped = drop(part, [p for p, on in zip(params, enabled, strict=True) if on])
            weights[rows] = part.masked_fill_(dropped, 0)
    return weights


def _below_top_k(weights: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """Mask of the tokens that top-k drops. [N, vocab] bool"""
    vocab = weights.shape[1]
    counts = torch.tensor([min(p.top_k or vocab, vocab) for p in params], device=weights.device)
    largest = weights.topk(int(counts.max()), dim=-1).values
    return weights < largest.gather(1, counts.unsqueeze(1) - 1)


def _beyond_top_p(weights: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """Mask of the tokens that top-p drops. [N, vocab] bool"""
    top_p = _column([p.top_p for p in params], weights.device)
    total = weights.sum(dim=-1, keepdim=True)
    # Tokens below this weight together have at most the mass that top-p drops, so they need no sorting.
    candidates = (weights > (1 - top_p) * total / weights.shape[1]).sum(dim=-1, keepdim=True).clamp_(min=1)
    largest = weights.topk(int(candidates.max()), dim=-1).values  # descending
    before = largest.cumsum(dim=-1).roll(1, dims=-1)
    before[:, 0] = 0  # mass of the tokens ahead of each
    count = torch.minimum((before < top_p * total).sum(dim=-1, keepdim=True), candidates)
    threshold = largest.gather(1, count - 1)
    equal = weights == threshold
    spare = count - (largest > threshold).sum(dim=-1, keepdim=True)  # number of equal tokens to keep
    return (weights < threshold) | (equal & (equal.cumsum(dim=-1) > spare))


def _below_min_p(weights: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """Mask of the tokens that min-p drops; the most likely token has weight 1. [N, vocab] bool"""
    return weights < _column([p.min_p for p in params], weights.device)


def _rows(enabled: Sequence[bool], device: torch.device) -> Tensor | slice:
    """Index of the enabled rows; a slice, which makes no copy, if all are enabled."""
    if all(enabled):
        return slice(None)
    return torch.tensor([row for row, on in enumerate(enabled) if on], device=device)


def _column(values: Sequence[float], device: torch.device) -> Tensor:
    """Makes a column of ``values``. [N, 1] float64"""
    return torch.tensor(values, dtype=torch.float64, device=device).unsqueeze(1)


def _inverse_cdf(weights: Tensor, u: Tensor) -> Tensor:
    """First token whose cumulative weight exceeds ``u`` of the total. [N, vocab], [N] -> [N]

    Overwrites ``weights``.
    """
    cumulative = weights.cumsum_(dim=-1)
    target = u.unsqueeze(1) * cumulative[:, -1:]
    return torch.searchsorted(cumulative, target, right=True).squeeze(1)


def _logprobs(logits: Tensor, chosen: Tensor, requested: dict[int, int]) -> list[SampledToken]:
    """Adds log-probabilities to the tokens of the rows in ``requested``, in its order.

    Args:
        requested: row -> number of most likely tokens to list.
    """
    if not requested:
        return []
    rows = torch.tensor(list(requested), device=logits.device)
    scores = logits[rows].log_softmax(dim=-1)
    ids = chosen[rows]
    own = scores.gather(1, ids.unsqueeze(1)).squeeze(1).tolist()
    # k is constant, so that the order of equal tokens does not depend on the other rows.
    top = scores.topk(min(MAX_LOGPROBS, scores.shape[1]), dim=-1)
    return [
        SampledToken(token, logprob, list(zip(best_ids, best, strict=True))[:count])
        for token, logprob, best_ids, best, count in zip(
            ids.tolist(), own, top.indices.tolist(), top.values.tolist(), requested.values(), strict=True
        )
    ]

"""Chooses the next token of every row of logits.

Each choice is a function of that row's logits, parameters, seed, position and sample index, and of nothing
else: neither of the other rows nor of what was drawn before. Knows nothing of sequences or stop rules.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from overfill.errors import InternalError
from overfill.model.native.drawing import draw
from overfill.model.philox import uniform
from overfill.request.params import MAX_LOGPROBS, SamplingParams


@dataclass(frozen=True, slots=True)
class SampledToken:
    """A chosen token.

    Attributes:
        logprob: of the token under softmax(logits), before temperature and filters; None when not asked for.
        top: (token id, logprob) of the most likely tokens, best first; None when not asked for.
    """

    token_id: int
    logprob: float | None = None
    top: list[tuple[int, float]] | None = None


def sample(
    logits: Tensor,
    params: Sequence[SamplingParams],
    positions: Sequence[int],
    sample_indices: Sequence[int],
) -> tuple[list[SampledToken], dict[int, Exception]]:
    """Chooses one token per row.

    Greedy rows take the most likely token. The others draw ``u = Philox(seed; sample_index, position)`` and
    take the first token, in id order, at which the cumulative filtered distribution exceeds ``u``.

    Args:
        logits: [N, vocab] float32.
        params: one per row.
        positions: one per row; the position that the chosen token will have.
        sample_indices: one per row; which of a request's answers the row belongs to.

    Returns:
        A token per row; and row -> error of rows that hold NaN or +inf, or nothing finite, whose tokens mean nothing.

    Raises:
        ValueError: a row that is not greedy has no seed.
    """
    drawn = [row for row, p in enumerate(params) if not p.greedy]
    unseeded = [row for row in drawn if params[row].seed is None]
    if unseeded:
        raise ValueError(f"rows {unseeded} are to be sampled and have no seed")
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
    wanted = {row: p.logprobs for row, p in enumerate(params) if p.logprobs is not None and row not in failed}
    result = [SampledToken(token) for token in tokens]
    for row, scored in zip(wanted, _logprobs(logits, chosen, wanted), strict=True):
        result[row] = scored
    return result, failed


def non_finite_errors(tokens: Sequence[int]) -> dict[int, Exception]:
    """Row -> error of tokens that are -1, which stands for a row of logits that is not finite."""
    return {row: InternalError("the logits are not finite") for row, token in enumerate(tokens) if token < 0}


def _most_likely(logits: Tensor) -> Tensor:
    """[N] int64; -1 where there is none."""
    chosen = logits.argmax(dim=-1)  # the index of a NaN, if there is one
    finite = logits.gather(1, chosen.unsqueeze(1)).squeeze(1).isfinite()
    return torch.where(finite, chosen, -1)


def _draw(logits: Tensor, params: Sequence[SamplingParams], u: NDArray[np.float64]) -> Tensor:
    """[N] int64; -1 where the logits are not finite. None of ``params`` is greedy."""
    native = draw(logits, params, u)
    if native is not None:
        return native
    lost = _most_likely(logits) < 0
    weights = filtered_weights(logits.masked_fill(lost.unsqueeze(1), 0), params)  # filters index by counts: no NaN
    tokens = _inverse_cdf(weights, torch.from_numpy(u).to(logits.device))
    return torch.where(lost, -1, tokens)


def filtered_weights(logits: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """Unnormalised probabilities after temperature, top-k, top-p and min-p, in this order.

    As in Hugging Face *generate*: tokens that tie with the k-th stay; top-p keeps the smallest set with at
    least that mass (of equal tokens, those with lower ids); min-p compares with the most likely token, which
    always stays.

    Args:
        logits: [N, vocab] float32.
        params: one per row, none greedy.

    Returns:
        [N, vocab] float64; zero for tokens that are filtered out, one for the most likely.
    """
    temperatures = _column([p.temperature for p in params], logits.device)
    weights = logits.double()  # in place from here on: fresh memory of this size costs more than the arithmetic
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
    """What to drop. [N, vocab] bool."""
    vocab = weights.shape[1]
    counts = torch.tensor([min(p.top_k or vocab, vocab) for p in params], device=weights.device)
    largest = weights.topk(int(counts.max()), dim=-1).values
    return weights < largest.gather(1, counts.unsqueeze(1) - 1)


def _beyond_top_p(weights: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """What to drop. [N, vocab] bool."""
    top_p = _column([p.top_p for p in params], weights.device)
    total = weights.sum(dim=-1, keepdim=True)
    # All tokens below this share together weigh no more than what top-p drops: none of them needs sorting.
    candidates = (weights > (1 - top_p) * total / weights.shape[1]).sum(dim=-1, keepdim=True).clamp_(min=1)
    largest = weights.topk(int(candidates.max()), dim=-1).values  # descending
    before = largest.cumsum(dim=-1).roll(1, dims=-1)
    before[:, 0] = 0  # mass of the tokens ahead of each
    count = torch.minimum((before < top_p * total).sum(dim=-1, keepdim=True), candidates)
    threshold = largest.gather(1, count - 1)
    equal = weights == threshold
    spare = count - (largest > threshold).sum(dim=-1, keepdim=True)  # how many of the equal ones to keep
    return (weights < threshold) | (equal & (equal.cumsum(dim=-1) > spare))


def _below_min_p(weights: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """What to drop; the most likely token weighs one. [N, vocab] bool."""
    return weights < _column([p.min_p for p in params], weights.device)


def _rows(enabled: Sequence[bool], device: torch.device) -> Tensor | slice:
    """Index of the enabled rows; where all are, one that makes no copy."""
    if all(enabled):
        return slice(None)
    return torch.tensor([row for row, on in enumerate(enabled) if on], device=device)


def _column(values: Sequence[float], device: torch.device) -> Tensor:
    """[N, 1] float64."""
    return torch.tensor(values, dtype=torch.float64, device=device).unsqueeze(1)


def _inverse_cdf(weights: Tensor, u: Tensor) -> Tensor:
    """First token whose cumulative weight exceeds ``u`` of the total; spends ``weights``. [N, vocab], [N] -> [N]."""
    cumulative = weights.cumsum_(dim=-1)
    target = u.unsqueeze(1) * cumulative[:, -1:]
    return torch.searchsorted(cumulative, target, right=True).squeeze(1)


def _logprobs(logits: Tensor, chosen: Tensor, wanted: dict[int, int]) -> list[SampledToken]:
    """The tokens of the rows in ``wanted`` (row -> how many of the most likely to list), in its order."""
    if not wanted:
        return []
    rows = torch.tensor(list(wanted), device=logits.device)
    scores = logits[rows].log_softmax(dim=-1)
    ids = chosen[rows]
    own = scores.gather(1, ids.unsqueeze(1)).squeeze(1).tolist()
    # Always the same k, so that which of two equal tokens is listed does not depend on the other rows.
    top = scores.topk(min(MAX_LOGPROBS, scores.shape[1]), dim=-1)
    return [
        SampledToken(token, logprob, list(zip(best_ids, best, strict=True))[:count])
        for token, logprob, best_ids, best, count in zip(
            ids.tolist(), own, top.indices.tolist(), top.values.tolist(), wanted.values(), strict=True
        )
    ]

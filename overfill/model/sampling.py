"""Samples the next token of every row of logits.

A row's token depends on its logits, parameters, seed, position and sample index only, neither on the other rows nor on
earlier draws. This module does not know sequences or stop rules.

A token is drawn by an exponential race (the Gumbel-max trick; Maddison et al., "A* sampling", 2014, section 2). Each
token has its own random number, so that a small change of the logits changes the outcome only if two keys nearly tie.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import pad

from overfill.errors import InternalError
from overfill.model.native.drawing import draw
from overfill.model.philox import token_words
from overfill.model.steps import SampledToken
from overfill.model.upload import upload
from overfill.request.params import MAX_LOGPROBS, SamplingParams

log = logging.getLogger(__name__)

_CHUNK = 1 << 16
"""Tokens whose keys are computed at once. Small, because on CPUs fresh memory costs more than the arithmetic."""

_KERNEL_CHUNK = 1 << 22
"""Tokens whose filters are computed at once on a CUDA device. Top-p takes up to 9 times the bytes of their logits:
150 MB."""

_REACH = 26.0
"""A token this far below the greatest logit, after temperature, cannot win, because ``-log e`` differs by less."""

_MIN_TEMPERATURE, _MAX_TEMPERATURE = 1e-37, 1e37  # differences of logits stay numbers in float32


def sample(
    logits: Tensor,
    params: Sequence[SamplingParams],
    positions: Sequence[int],
    sample_indices: Sequence[int],
) -> tuple[list[SampledToken], dict[int, Exception]]:
    """Samples one token per row.

    A greedy row gets the most likely token. Any other row gets the token with the greatest of ``race_keys``; of equals
    the one with the lowest id.

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
    chosen = choose(logits, params, positions, sample_indices)
    tokens = chosen.tolist()
    failed = non_finite_errors(tokens)
    requested = {row: p.logprobs for row, p in enumerate(params) if p.logprobs is not None and row not in failed}
    result = [SampledToken(token) for token in tokens]
    for row, scored in zip(requested, logprobs(logits, chosen, requested), strict=True):
        result[row] = scored
    return result, failed


def choose(
    logits: Tensor, params: Sequence[SamplingParams], positions: Sequence[int], sample_indices: Sequence[int]
) -> Tensor:
    """As ``sample``, without log-probabilities. Leaves the tokens on the device: -1 for broken rows. [N] int64"""
    drawn = [row for row, p in enumerate(params) if not p.greedy]
    unseeded = [row for row in drawn if params[row].seed is None]
    if unseeded:
        raise ValueError(f"rows {unseeded} are sampled but have no seed")
    if not drawn:
        return _most_likely(logits)
    if len(drawn) == len(params):
        return _draw(logits, params, positions, sample_indices)
    chosen = logits.new_empty(len(params), dtype=torch.int64)
    likely = _rows([p.greedy for p in params], logits.device)
    chosen[likely] = _most_likely(logits[likely])
    rows = _rows([not p.greedy for p in params], logits.device)
    chosen[rows] = _draw(
        logits[rows],
        [params[row] for row in drawn],
        [positions[row] for row in drawn],
        [sample_indices[row] for row in drawn],
    )
    return chosen


def non_finite_errors(tokens: Sequence[int]) -> dict[int, Exception]:
    """Row -> error for tokens of -1, which mark rows of logits that are not finite."""
    return {row: non_finite() for row, token in enumerate(tokens) if token < 0}


def non_finite() -> InternalError:
    """The error of a row whose logits are not finite."""
    return InternalError("the logits are not finite")


def _most_likely(logits: Tensor) -> Tensor:
    """The most likely token of each row, -1 for broken rows. [N] int64"""
    # The index of a NaN, if the row has one. On CPUs numpy is eight times faster than torch.
    on_cpu = logits.device.type == "cpu"
    chosen = torch.from_numpy(logits.numpy().argmax(axis=-1)) if on_cpu else logits.argmax(dim=-1)
    finite = logits.gather(1, chosen.unsqueeze(1)).squeeze(1).isfinite()
    return torch.where(finite, chosen, -1)


def _draw(
    logits: Tensor, params: Sequence[SamplingParams], positions: Sequence[int], sample_indices: Sequence[int]
) -> Tensor:
    """Draws a token for each row, -1 for rows whose logits are not finite. No row is greedy. [N] int64"""
    native = draw(logits, params, positions, sample_indices)
    if native is not None:
        return native
    if _kernel_runs(logits.device):
        winners, size = race_in_kernel, _KERNEL_CHUNK // logits.shape[1]
    else:
        winners, size = _race_in_torch, _CHUNK // logits.shape[1]
    tokens = logits.new_empty(len(logits), dtype=torch.int64)
    for start in range(0, len(logits), max(1, size)):
        part = slice(start, start + max(1, size))
        tokens[part] = winners(logits[part], params[part], positions[part], sample_indices[part])
    return tokens


def _race_in_torch(
    logits: Tensor, params: Sequence[SamplingParams], positions: Sequence[int], sample_indices: Sequence[int]
) -> Tensor:
    """The token with the greatest of ``race_keys`` for each row, -1 for broken rows. [N] int64"""
    winners = race_keys(logits, params, positions, sample_indices).argmax(dim=-1)
    return torch.where(_most_likely(logits) < 0, -1, winners)


def race_in_kernel(
    logits: Tensor, params: Sequence[SamplingParams], positions: Sequence[int], sample_indices: Sequence[int]
) -> Tensor:
    """The same as ``_race_in_torch``, found by a Triton kernel."""
    from overfill.model.race_kernel import race  # builds of torch for CPUs have no Triton

    temperatures = _temperatures(params, logits.device).float()
    # Tensors hold the seeds' bits as signed numbers.
    seeds = upload(torch.tensor([((p.seed or 0) ^ 1 << 63) - (1 << 63) for p in params]), logits.device)
    counters = upload(torch.tensor([positions, sample_indices]), logits.device)
    return race(logits.contiguous(), temperatures, filter_bounds(logits, params), seeds, counters)


@cache
def _kernel_runs(device: torch.device) -> bool:
    """True if ``race_in_kernel`` runs on ``device`` and draws what ``race_keys`` says. Logs the reason if not."""
    if device.type != "cuda":
        return False
    request = [SamplingParams(seed=seed) for seed in range(64)], range(64), [0] * 64
    logits = torch.linspace(0, 5, 64 * 3000, device=device).view(64, 3000)
    try:
        keys, tokens = race_keys(logits, *request), race_in_kernel(logits, *request)
        ties = keys.gather(1, tokens.unsqueeze(1)) >= keys.amax(dim=1, keepdim=True) - 1e-5
        reason = None if ties.all() else "it draws other tokens than the reference"
    except Exception as error:  # Triton needs a C compiler and Python's headers, and reports their absence in many ways
        reason = str(error)
    if reason is not None:
        log.warning("the kernel that draws tokens on %s is not used, and sampling is slower: %s", device, reason)
    return reason is None


def race_keys(
    logits: Tensor, params: Sequence[SamplingParams], positions: Sequence[int], sample_indices: Sequence[int]
) -> Tensor:
    """Keys of the exponential race, in which the greatest key wins.

    The key of a token that the filters leave is ``(logit - greatest logit) / temperature - log e``. Its exponential
    number ``e = -log1p(-v)`` comes from its word ``w`` (``philox.token_words``): ``v = (w + 1/2) / 2^32``, at most
    ``1 - 2^-24``. So ``log e`` lies between -22.9 and 2.9. The keys of a block of four tokens that are all more than 26
    temperatures below the greatest logit are not computed.

    Args:
        logits: [N, vocab] float32, with a greatest element that is finite.
        params: one per row, none greedy, all with a seed.
        positions: position of the sampled token, per row.
        sample_indices: number of the answer among the request's answers, per row.

    Returns:
        [N, vocab] float32; -inf for tokens that are filtered or cannot win.
    """
    scaled = _scaled(logits, params).masked_fill_(~kept(logits, params), -math.inf)
    vocab = logits.shape[1]
    keys: Tensor = pad(scaled, (0, -vocab % 4), value=-math.inf).unflatten(1, (-1, 4))
    able = keys.amax(dim=2) >= -_REACH
    blocks = able.any(dim=0).nonzero().squeeze(1)
    words = token_words([p.seed or 0 for p in params], positions, sample_indices, blocks)
    v = words.float().add_(0.5).mul_(2.0**-32).clamp_(max=1 - 2.0**-24)
    keys[:, blocks] -= v.neg_().log1p_().neg_().log_()
    return keys.masked_fill_(~able.unsqueeze(2), -math.inf).flatten(1)[:, :vocab]


def kept(logits: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """Mask of the tokens that top-k, top-p and min-p leave, in this order, after temperature.

    The rules are those of Hugging Face *generate*:

    - top-k keeps tokens that tie with the k-th.
    - top-p keeps the smallest set with at least that mass; among equal tokens, those with lower ids.
    - min-p compares with the most likely token, which always stays.

    Args:
        logits: [N, vocab] float32, with a greatest element that is finite.
        params: one per row, none greedy.

    Returns:
        [N, vocab] bool.
    """
    least, last = filter_bounds(logits, params)
    ids = torch.arange(logits.shape[1], device=logits.device)
    return (logits > least) | ((logits == least) & (ids <= last))


def filter_bounds(logits: Tensor, params: Sequence[SamplingParams]) -> tuple[Tensor, Tensor]:
    """Expresses the filters of each row as bounds; see ``kept`` for arguments and rules.

    Returns:
        ``least``, [N, 1] float32, and ``last``, [N, 1] int64. A token stays if its logit exceeds ``least``, or equals
        it and its id is at most ``last``.
    """
    rows, vocab = logits.shape
    least = logits.new_full((rows, 1), -math.inf)
    last = torch.full((rows, 1), vocab, device=logits.device)
    enabled = [p.top_k is not None and p.top_k < vocab for p in params]
    if any(enabled):
        selected = _rows(enabled, logits.device)
        counts = [p.top_k for p, on in zip(params, enabled, strict=True) if on and p.top_k is not None]
        largest = logits[selected].topk(max(counts), dim=-1).values
        least[selected] = largest.gather(1, upload(torch.tensor(counts), logits.device).unsqueeze(1) - 1)
    enabled = [p.top_p < 1 for p in params]
    if any(enabled):
        selected = _rows(enabled, logits.device)
        nucleus = [p for p, on in zip(params, enabled, strict=True) if on]
        least[selected], last[selected] = _top_p_bounds(logits[selected], least[selected], nucleus)
    if any(p.min_p > 0 for p in params):
        shares = _column([p.min_p for p in params], logits.device).log_()
        floor = (logits.amax(dim=-1, keepdim=True) + shares * _temperatures(params, logits.device)).float()
        last.masked_fill_(floor > least, vocab)
        least = torch.maximum(least, floor)
    return least, last


def _top_p_bounds(logits: Tensor, least: Tensor, params: Sequence[SamplingParams]) -> tuple[Tensor, Tensor]:
    """``filter_bounds`` of top-p, for rows of which the tokens below ``least`` [N, 1] are dropped already."""
    top_p = _column([p.top_p for p in params], logits.device)
    weights = _scaled(logits, params).exp_().masked_fill_(logits < least, 0)
    total = weights.sum(dim=-1, keepdim=True).double()
    # Tokens below this weight together have less than the mass that top-p drops, so they need no sorting.
    share = (0.999 * (1 - top_p) * total / logits.shape[1]).float()
    candidates = (weights > share).sum(dim=-1, keepdim=True).clamp_(min=1)
    largest = logits.topk(int(candidates.max()), dim=-1).values  # descending
    mass = ((largest - largest[:, :1]) / _temperatures(params, logits.device)).exp_()
    before = mass.cumsum(dim=-1) - mass  # mass of the tokens ahead of each
    count = torch.minimum((before < top_p * total).sum(dim=-1, keepdim=True), candidates).clamp_(min=1)  # 0 with NaN
    threshold = largest.gather(1, count - 1)
    tied = count - (largest > threshold).sum(dim=-1, keepdim=True)  # number of tokens equal to the threshold that stay
    ahead = (logits == threshold).cumsum(dim=-1, dtype=torch.int32) < tied
    return threshold, ahead.sum(dim=-1, keepdim=True)


def _scaled(logits: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """(logit - greatest logit) / temperature. [N, vocab] float32"""
    temperatures = _temperatures(params, logits.device).float()
    return (logits - logits.amax(dim=-1, keepdim=True)).div_(temperatures)


def _temperatures(params: Sequence[SamplingParams], device: torch.device) -> Tensor:
    """[N, 1] float64"""
    return _column([min(max(p.temperature, _MIN_TEMPERATURE), _MAX_TEMPERATURE) for p in params], device)


def _rows(enabled: Sequence[bool], device: torch.device) -> Tensor | slice:
    """Index of the enabled rows; a slice, which makes no copy, if all are enabled."""
    if all(enabled):
        return slice(None)
    return upload(torch.tensor([row for row, on in enumerate(enabled) if on]), device)


def _column(values: Sequence[float], device: torch.device) -> Tensor:
    """Makes a column of ``values``. [N, 1] float64"""
    return upload(torch.tensor(values, dtype=torch.float64), device).unsqueeze(1)


def logprobs(logits: Tensor, chosen: Tensor, requested: dict[int, int]) -> list[SampledToken]:
    """Adds log-probabilities to the tokens of the rows in ``requested``, in its order.

    Args:
        chosen: the token of each row of ``logits``. [N] int64
        requested: row -> number of most likely tokens to list.
    """
    if not requested:
        return []
    rows = upload(torch.tensor(list(requested)), logits.device)
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

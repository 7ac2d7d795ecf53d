"""Draws tokens on a CUDA device in one Triton kernel; ``model.sampling.race_keys`` is the definition.

Only ``model.sampling`` imports this module, when it draws on a CUDA device: builds of torch for CPUs have no Triton.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 2048  # tokens whose keys are computed at once


def race(
    logits: Tensor, temperatures: Tensor, bounds: tuple[Tensor, Tensor], seeds: Tensor, counters: Tensor
) -> Tensor:
    """Draws one token per row; no copy of the logits is made.

    Args:
        logits: [N, vocab] float32, contiguous.
        temperatures: [N, 1] float32.
        bounds: ``least``, [N, 1] float32, and ``last``, [N, 1] int64; see ``model.sampling.filter_bounds``.
        seeds: [N] int64 with the bits of 64-bit seeds.
        counters: [2, N] int64: position and sample index.

    Returns:
        [N] int64, -1 for rows with NaN or +inf, or without a finite logit.
    """
    rows, vocab = logits.shape
    chosen = torch.empty(rows, dtype=torch.int64, device=logits.device)
    _race[(rows,)](logits, temperatures, *bounds, seeds, *counters, chosen, vocab, BLOCK=_BLOCK, num_warps=8)
    return chosen


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _race(  # type: ignore[no-untyped-def]
    logits, temperatures, least, last, seeds, positions, sample_indices, chosen, vocab, BLOCK: tl.constexpr
):
    """One program draws for one row."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * vocab
    offsets = tl.arange(0, BLOCK)
    tops = tl.full([BLOCK], -float("inf"), tl.float32)
    broken = tl.zeros([BLOCK], tl.int32)
    for start in range(0, vocab, BLOCK):
        x = tl.load(logits + start + offsets, mask=start + offsets < vocab, other=-float("inf"))
        broken |= (x != x).to(tl.int32)
        tops = tl.maximum(tops, x)
    highest = tl.max(tops)
    lost = (tl.max(broken) > 0) | (tl.abs(highest) == float("inf"))
    temperature = tl.load(temperatures + row)
    bound = tl.load(least + row)
    bound_id = tl.load(last + row)
    seed = tl.load(seeds + row)
    position = tl.load(positions + row).to(tl.uint32)
    sample_index = tl.load(sample_indices + row).to(tl.uint32)
    best = -float("inf")
    winner = tl.full([], 0, tl.int64)
    for start in range(0, vocab, BLOCK):
        ids = start + offsets
        x = tl.load(logits + ids, mask=ids < vocab, other=-float("inf"))
        stays = (x > bound) | ((x == bound) & (ids <= bound_id))
        keys = tl.where(stays, tl.div_rn(x - highest, temperature), -float("inf"))
        if tl.max(keys) + 22.9 >= best:  # -log e is at most 22.9
            blocks = (start // 4 + tl.arange(0, BLOCK // 4)).to(tl.uint32)
            zeros = tl.zeros_like(blocks)
            a, b, c, d = tl.philox(seed, zeros + position, zeros + sample_index, blocks, zeros)
            words = tl.interleave(tl.interleave(a, c), tl.interleave(b, d))  # in the order of ids
            keys -= tl.log(_exponential(words))
            top = tl.max(keys)
            first = tl.min(tl.where(keys == top, ids, vocab)).to(tl.int64)
            winner = tl.where(top > best, first, winner)
            best = tl.maximum(top, best)
    tl.store(chosen + row, tl.where(lost, -1, winner))


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _exponential(words):  # type: ignore[no-untyped-def]
    """The exponential numbers of random words: ``-log1p(-v)``.

    The device's logarithm is coarse near 1, so that small ``v`` take the series of ``2 atanh(v / (2 - v))``.
    """
    v = tl.minimum((words.to(tl.float32) + 0.5) * 2.0**-32, 1 - 2.0**-24)
    s = tl.div_rn(v, 2 - v)
    q = s * s
    series = 2 * s * (1 + q * (1 / 3 + q * (1 / 5 + q * (1 / 7 + q * (1 / 9)))))
    return tl.where(v < 0.25, series, -tl.log(1 - v))

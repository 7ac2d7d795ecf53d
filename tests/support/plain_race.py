"""The draw of a token in plain Python, as its definition reads, and known answers of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from overfill.request.params import SamplingParams

_WORD = 2**32

RANDOM123 = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]
"""Known answers of Philox4x32-10, from Random123, the reference implementation: counter, key, result."""


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


def philox4x32(counter: Sequence[int], key: Sequence[int]) -> list[int]:
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        high0, low0 = divmod(0xD2511F53 * c0, _WORD)
        high1, low1 = divmod(0xCD9E8D57 * c2, _WORD)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) % _WORD, (k1 + 0xBB67AE85) % _WORD
    return [c0, c1, c2, c3]


def luck(seed: int, position: int, sample_index: int, token_id: int) -> float:
    """-log e of a token."""
    high, low = divmod(seed, _WORD)
    word = philox4x32([position, sample_index, token_id // 4, 0], [low, high])[token_id % 4]
    v = min((word + 0.5) / _WORD, 1 - 2**-24)
    return -math.log(-math.log1p(-v))


LOGITS = torch.tensor([(token * 7919) % 1009 / 100 for token in range(1000)])
"""The row that ``KNOWN_DRAWS`` are drawn from."""

KNOWN_DRAWS: list[tuple[int, int, int, dict[str, Any], int]] = [
    (0, 0, 0, {}, 383),
    (1, 0, 0, {}, 140),
    (1, 1, 0, {}, 852),
    (1, 0, 1, {}, 482),
    (2**64 - 1, 2**31, 65535, {}, 686),
    (1 << 32, 7, 3, {"temperature": 2.5}, 87),
    (5, 100, 0, {"temperature": 0.1}, 277),
    (9, 1000, 2, {"top_k": 5}, 765),
    (10, 77, 0, {"top_p": 0.5}, 297),
    (11, 5, 1, {"min_p": 0.3, "temperature": 1.7}, 818),
    (12, 4095, 0, {"temperature": 1.3, "top_k": 50, "top_p": 0.9, "min_p": 0.05}, 686),
]
"""Seed, position, sample index, other parameters, and the token that every implementation draws from ``LOGITS``.

They never change: a change would alter the answers of all seeds.
"""


def known_requests() -> tuple[list[SamplingParams], list[int], list[int], list[int]]:
    """Parameters, positions, sample indices and tokens of ``KNOWN_DRAWS``, one row each."""
    seeds, positions, sample_indices, options, tokens = (list(column) for column in zip(*KNOWN_DRAWS, strict=True))
    params = [SamplingParams(seed=seed, **option) for seed, option in zip(seeds, options, strict=True)]
    return params, positions, sample_indices, tokens

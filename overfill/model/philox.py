"""Philox4x32-10, a counter-based random generator, vectorised in numpy.

Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011). A counter's number never depends on earlier
draws.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

_ROUNDS = 10
_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_KEY_STEPS = (np.uint32(0x9E3779B9), np.uint32(0xBB67AE85))
_HALF = np.uint64(32)


def philox4x32(counters: NDArray[np.uint32], keys: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """Runs ten rounds of Philox. counters: [N, 4]; keys: [N, 2]; returns [N, 4] random words."""
    c0, c1, c2, c3 = counters.T
    k0, k1 = keys.T
    for _ in range(_ROUNDS):
        high0, low0 = _multiply(_MULTIPLIERS[0], c0)
        high1, low1 = _multiply(_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = k0 + _KEY_STEPS[0], k1 + _KEY_STEPS[1]
    return np.stack((c0, c1, c2, c3), axis=1)


def uniform(seeds: Sequence[int], sample_indices: Sequence[int], positions: Sequence[int]) -> NDArray[np.float64]:
    """Draws one number in [0, 1) per row, with 53 random bits.

    The key is the 64-bit seed (low word first), the counter ``(position, sample_index, 0, 0)``.

    Returns:
        [N] float64.
    """
    seed_words = np.array(seeds, dtype=np.uint64)
    keys = np.stack((seed_words, seed_words >> _HALF), axis=1).astype(np.uint32)
    counters = np.zeros((len(seed_words), 4), dtype=np.uint32)
    counters[:, 0] = positions
    counters[:, 1] = sample_indices
    words = philox4x32(counters, keys)
    return ((words[:, 0] >> 5) * 2.0**26 + (words[:, 1] >> 6)) * 2.0**-53


def _multiply(multiplier: np.uint64, word: NDArray[np.uint32]) -> tuple[NDArray[np.uint32], NDArray[np.uint32]]:
    """Returns the high and the low word of the 64-bit product."""
    product = multiplier * word.astype(np.uint64)
    return (product >> _HALF).astype(np.uint32), product.astype(np.uint32)

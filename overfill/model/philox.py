"""Philox4x32-10, a counter-based random generator, in torch.

Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011). A counter's words never depend on earlier draws.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_ROUNDS = 10
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_WORD = 0xFFFFFFFF


def philox4x32(counter: Sequence[Tensor], key: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Runs ten rounds of Philox.

    Args:
        counter: 4 int64 tensors of words in [0, 2^32) that broadcast.
        key: 2 such tensors.

    Returns:
        4 int64 tensors of random words, of the broadcast shape.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]  # wrap to their 64 bits
        c0 = (product1 >> 32).bitwise_xor(c1).bitwise_xor_(k0).bitwise_and_(_WORD)
        c2 = (product0 >> 32).bitwise_xor(c3).bitwise_xor_(k1).bitwise_and_(_WORD)
        c1, c3 = product1.bitwise_and_(_WORD), product0.bitwise_and_(_WORD)
        k0, k1 = (k0 + _KEY_STEPS[0]) & _WORD, (k1 + _KEY_STEPS[1]) & _WORD
    return c0, c1, c2, c3


def token_words(
    seeds: Sequence[int], positions: Sequence[int], sample_indices: Sequence[int], blocks: Tensor
) -> Tensor:
    """The random words of blocks of four tokens.

    Token ``id`` has word ``id mod 4`` of the counter ``(position, sample_index, id div 4, 0)``. The key is the seed,
    low word first.

    Args:
        seeds: 64 bits, for each of N rows.
        positions: 32 bits, per row.
        sample_indices: 32 bits, per row.
        blocks: [M] int64; block ``b`` has the tokens ``4 b`` to ``4 b + 3``.

    Returns:
        [N, M, 4] int64 in [0, 2^32), on the device of ``blocks``.
    """
    low, high = [seed & _WORD for seed in seeds], [seed >> 32 for seed in seeds]
    numbers = torch.tensor([positions, sample_indices, low, high], device=blocks.device)
    c0, c1, k0, k1 = numbers.unsqueeze(2)  # [N, 1] each
    return torch.stack(philox4x32((c0, c1, blocks, torch.zeros_like(c0)), (k0, k1)), dim=2)

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
_WORDS = 4  # per counter


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
        high0, low0 = _multiply(_MULTIPLIERS[0], c0)
        high1, low1 = _multiply(_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _KEY_STEPS[0]) & _WORD, (k1 + _KEY_STEPS[1]) & _WORD
    return c0, c1, c2, c3


def token_words(seeds: Tensor, positions: Tensor, sample_indices: Tensor, vocab: int) -> Tensor:
    """The random word of every token of a vocabulary.

    Token ``id`` has word ``id mod 4`` of the counter ``(position, sample_index, id div 4, 0)``. The key is the seed,
    low word first.

    Args:
        seeds: [N] int64 with the bits of 64-bit seeds.
        positions: [N] int64.
        sample_indices: [N] int64.
        vocab: number of tokens.

    Returns:
        [N, vocab] int64 in [0, 2^32), on the device of ``seeds``.
    """
    counter, answer, seed = (values.unsqueeze(1) for values in (positions, sample_indices, seeds))
    blocks = torch.arange(-(-vocab // _WORDS), device=seeds.device).unsqueeze(0)
    key = (seed & _WORD, seed >> 32 & _WORD)
    words = philox4x32((counter, answer, blocks, torch.zeros_like(counter)), key)
    return torch.stack(words, dim=2).flatten(1)[:, :vocab]


def _multiply(multiplier: int, word: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the high and the low word of the 64-bit product."""
    product = word * multiplier  # wraps to the product's 64 bits
    return product >> 32 & _WORD, product & _WORD

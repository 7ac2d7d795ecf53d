"""An output head with full rows for common tokens and rows of low rank for rare tokens.

A step reads the whole head, which is a fifth of a small model, although half of a vocabulary is rarely sampled. The
rows of rare tokens (the *tail*) therefore have rank ``tail_rank``. The checkpoint stores them as ordinary rows, so
that plain transformers computes the same logits. The engine recovers their factors and reads those instead.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic

import torch
from torch import Tensor
from typing_extensions import TypeVar

from overfill.errors import InvalidPair
from overfill.model.config import HEAD_KEY
from overfill.model.quantize import Matrix, linear

M_co = TypeVar("M_co", bound=Matrix, default=Tensor, covariant=True)

_MAX_RESIDUE = 1e-2  # share of the tail's norm; rounding to bfloat16 stays far below it


@dataclass(frozen=True, slots=True)
class LowRankRows(Generic[M_co]):
    """The head's rows of rare tokens, ``left @ right``.

    Attributes:
        left: [vocab - head_tokens, tail_rank].
        right: [tail_rank, hidden].
        row_index: [vocab] int64, each token's row in the full rows followed by the rows of ``left``.
    """

    left: M_co
    right: M_co
    row_index: Tensor

    @property
    def nbytes(self) -> int:
        return self.left.nbytes + self.right.nbytes


def tokens_in_row_order(vocab_size: int, mask: bytes) -> Tensor:
    """The tokens of full rows, by id, followed by the tokens of the tail, by id. [vocab] int64

    Args:
        mask: ``ModelConfig.head_mask``.
    """
    if not mask:
        return torch.arange(vocab_size)
    octets = torch.tensor(list(mask), dtype=torch.uint8)
    whole = (octets[:, None] >> torch.arange(8, dtype=torch.uint8) & 1).bool().flatten()[:vocab_size]
    return torch.cat([whole.nonzero().squeeze(1), (~whole).nonzero().squeeze(1)])


def low_rank_factors(rows: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Factorises ``rows`` into ``left @ right``, exact up to rounding.

    Args:
        rows: [n, hidden], of rank ``rank`` or less.

    Returns:
        left, [n, rank], and right, [rank, hidden], both float32.

    Raises:
        InvalidPair: the rows have a higher rank, for instance after training that did not preserve it.
    """
    wide = rows.double()
    _, directions = torch.linalg.eigh(wide.T @ wide)  # in ascending order of eigenvalues
    right = directions[:, -rank:].T
    left = wide @ right.T
    if float((wide - left @ right).norm()) > _MAX_RESIDUE * float(wide.norm()):
        raise InvalidPair(f"the head's rows of rare tokens exceed rank {rank}, which {HEAD_KEY} in config.json states")
    return left.float(), right.float()


def logits_of(x: Tensor, head: Matrix, tail: LowRankRows[Matrix] | None) -> Tensor:
    """Multiplies hidden states with the head. [tokens, hidden] -> [tokens, vocab], in ``x``'s dtype."""
    common = linear(x, head)
    if tail is None:
        return common
    return torch.cat([common, linear(linear(x, tail.right), tail.left)], dim=1).index_select(1, tail.row_index)

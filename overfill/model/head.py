"""An output head that is whole for common tokens and a product of low rank for the rest.

Half of a vocabulary is seldom written, yet a step reads all of the head: a fifth of a small model. Rows of rare tokens
are stored as what they are, rows of an ordinary head, but have rank ``tail_rank``; the engine finds the factors again
and reads those. Plain transformers sees nothing of it: the logits are the same.
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

_RESIDUE = 1e-2  # share of the tail's norm that rounding to bfloat16 stays far below


@dataclass(frozen=True, slots=True)
class LowRankRows(Generic[M_co]):
    """The head's rows of rare tokens: ``left @ right``.

    Attributes:
        left: [vocab - head_tokens, tail_rank].
        right: [tail_rank, hidden].
        row_index: [vocab] int64, of every token among the rows of the head and then of ``left``.
    """

    left: M_co
    right: M_co
    row_index: Tensor

    @property
    def nbytes(self) -> int:
        return self.left.nbytes + self.right.nbytes


def tokens_in_row_order(vocab_size: int, mask: bytes) -> Tensor:
    """[vocab] int64: the tokens whose rows are whole, by id, and then the others; ``mask`` as in ``ModelConfig``."""
    if not mask:
        return torch.arange(vocab_size)
    octets = torch.tensor(list(mask), dtype=torch.uint8)
    whole = (octets[:, None] >> torch.arange(8, dtype=torch.uint8) & 1).bool().flatten()[:vocab_size]
    return torch.cat([whole.nonzero().squeeze(1), (~whole).nonzero().squeeze(1)])


def head_mask_of(tokens: Tensor, vocab_size: int) -> bytes:
    """``ModelConfig.head_mask`` of these tokens."""
    bits = torch.zeros((vocab_size + 7) // 8 * 8, dtype=torch.uint8)
    bits[tokens] = 1
    return bytes((bits.view(-1, 8) << torch.arange(8, dtype=torch.uint8)).sum(1, dtype=torch.uint8).tolist())


def low_rank_factors(rows: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """``left`` and ``right``, float32, whose product is ``rows``, [n, hidden] of at most that rank, up to rounding.

    Raises:
        InvalidPair: the rows have a higher rank, as after training that did not know of it.
    """
    wide = rows.double()
    _, directions = torch.linalg.eigh(wide.T @ wide)  # by growing eigenvalue
    right = directions[:, -rank:].T
    left = wide @ right.T
    if float((wide - left @ right).norm()) > _RESIDUE * float(wide.norm()):
        raise InvalidPair(f"the head's rows of rare tokens are not of rank {rank}, as {HEAD_KEY} in config.json says")
    return left.float(), right.float()


def lower_rank(rows: Tensor, covariance: Tensor, rank: int) -> Tensor:
    """The matrix of rank ``rank`` nearest to ``rows`` in what it makes of inputs of such a covariance.

    Args:
        rows: [n, hidden].
        covariance: [hidden, hidden], of the inputs: E[x x'].

    Returns:
        [n, hidden] float32.
    """
    wide, ridge = rows.double(), 1e-6 * covariance.double().diagonal().mean()
    root = torch.linalg.cholesky(covariance.double() + ridge * torch.eye(len(covariance), dtype=torch.float64))
    scaled = wide @ root
    _, directions = torch.linalg.eigh(scaled.T @ scaled)
    kept = directions[:, -rank:]
    lowered: Tensor = torch.linalg.solve_triangular(root, scaled @ kept @ kept.T, upper=False, left=False)
    return lowered.float()


def logits_of(x: Tensor, head: Matrix, tail: LowRankRows[Matrix] | None) -> Tensor:
    """[tokens, hidden] -> [tokens, vocab], in ``x``'s dtype."""
    common = linear(x, head)
    if tail is None:
        return common
    return torch.cat([common, linear(linear(x, tail.right), tail.left)], dim=1).index_select(1, tail.row_index)

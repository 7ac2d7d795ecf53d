"""Choose the output head's rows that stay whole, and lower the rank of the others (``overfill.model.head``)."""

from __future__ import annotations

from base64 import b64encode
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class HeadPlan:
    """Split of the head: frequent tokens keep their rows, the others share a low-rank matrix (``overfill.model.head``).

    All rare tokens have the same weight in the low-rank approximation. Weighting them by frequency made the rarest
    tokens nearly impossible.

    Attributes:
        shares: [vocab] float32; frequency of each token. Of equally frequent tokens, those with lower ids keep their
            rows, because tokenizers give lower ids to common tokens.
        tokens: Number of rows that stay whole.
        tail_rank: Rank of the matrix of the other rows.
    """

    shares: Tensor
    tokens: int
    tail_rank: int

    def apply(self, head: Tensor, covariance: Tensor) -> Tensor:
        """Lowers the rank of the rare rows of ``head`` [vocab, hidden], for inputs with this covariance."""
        _, rest = self._split()
        return head.index_copy(0, rest, lower_rank(head[rest], covariance, self.tail_rank))

    def as_config(self) -> dict[str, Any]:
        """Returns the value of ``HEAD_KEY`` in ``config.json``: the head rows that stay whole, and the others' rank."""
        whole, _ = self._split()
        mask = b64encode(head_mask_of(whole, len(self.shares))).decode()
        return {"tokens": self.tokens, "tail_rank": self.tail_rank, "whole": mask}

    def _split(self) -> tuple[Tensor, Tensor]:
        """Returns the ids of the tokens whose rows stay, then the others."""
        order = self.shares.argsort(descending=True, stable=True)
        return order[: self.tokens], order[self.tokens :]


def head_mask_of(tokens: Tensor, vocab_size: int) -> bytes:
    """Encodes ``tokens``, those of full rows, as ``ModelConfig.head_mask``."""
    bits = torch.zeros((vocab_size + 7) // 8 * 8, dtype=torch.uint8)
    bits[tokens] = 1
    return bytes((bits.view(-1, 8) << torch.arange(8, dtype=torch.uint8)).sum(1, dtype=torch.uint8).tolist())


def lower_rank(rows: Tensor, covariance: Tensor, rank: int) -> Tensor:
    """The matrix of rank ``rank`` whose products with the inputs are nearest to those of ``rows``.

    Args:
        rows: [n, hidden].
        covariance: [hidden, hidden], E[x x'] of the inputs x.

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

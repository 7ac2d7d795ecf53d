"""Least squares from normal equations, so that memory does not grow with the number of rows."""

from __future__ import annotations

import torch
from torch import Tensor


class Ridge:
    """Accumulates rows of inputs and targets, then solves for the matrix that maps one to the other.

    Sums are kept in float64: thousands of rows are added, and the equations are ill-conditioned where inputs
    are nearly dependent.

    Args:
        num_inputs, num_targets: width of the rows.
    """

    def __init__(self, num_inputs: int, num_targets: int) -> None:
        self._moments = torch.zeros(num_inputs, num_inputs, dtype=torch.float64)
        self._cross = torch.zeros(num_inputs, num_targets, dtype=torch.float64)

    def add(self, inputs: Tensor, targets: Tensor) -> None:
        """[rows, num_inputs] and [rows, num_targets] float32."""
        self._moments += inputs.T @ inputs
        self._cross += inputs.T @ targets

    def solve(self, start: Tensor, strength: float) -> Tensor:
        """Minimises ``|inputs W' - targets|^2 + strength * mean(diag) * |W - start|^2``. Leaves the sums as they are.

        Args:
            start: [num_targets, num_inputs]; where W goes as ``strength`` grows.
            strength: relative to the mean square of an input.

        Returns:
            W, [num_targets, num_inputs] float32; not finite when the rows were not.
        """
        residual = self._cross - self._moments @ start.T.double()
        damped = self._moments.clone()
        diagonal = damped.diagonal()
        diagonal += max(strength * float(diagonal.mean()), torch.finfo(torch.float64).tiny)
        factor, failed = torch.linalg.cholesky_ex(damped)
        if failed:
            return torch.full_like(start, torch.nan)
        return start + torch.cholesky_solve(residual, factor).T.float()

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
        self._rows = 0

    def add(self, inputs: Tensor, targets: Tensor) -> None:
        """[rows, num_inputs] and [rows, num_targets] float32."""
        self._rows += len(inputs)
        self._moments += inputs.T @ inputs
        self._cross += inputs.T @ targets

    @property
    def covariance(self) -> Tensor:
        """E[x x'] of the inputs, [num_inputs, num_inputs] float64."""
        return self._moments / self._rows

    def solve(self, start: Tensor, prior_rows: float) -> Tensor:
        """Minimises ``|inputs W' - targets|^2 + prior_rows * s * |W - start|^2``, s being the mean square of an input.

        Args:
            start: [num_targets, num_inputs]; what W is without any rows.
            prior_rows: how many rows of independent inputs ``start`` weighs as much as.

        Returns:
            W, [num_targets, num_inputs] float32; not finite when the rows were not.
        """
        residual = self._cross - self._moments @ start.T.double()
        damped = self._moments.clone()
        diagonal = damped.diagonal()
        diagonal += max(prior_rows / self._rows * float(diagonal.mean()), torch.finfo(torch.float64).tiny)
        factor, failed = torch.linalg.cholesky_ex(damped)
        if failed:
            return torch.full_like(start, torch.nan)
        return start + torch.cholesky_solve(residual, factor).T.float()

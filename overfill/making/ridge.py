"""Solve ridge regression from normal equations, whose memory does not grow with the number of rows."""

from __future__ import annotations

import torch
from torch import Tensor


class Ridge:
    """Accumulates rows of inputs and targets, then solves for the matrix that maps one to the other.

    The sums are float64, because thousands of rows are added and nearly dependent inputs make the equations
    ill-conditioned.

    Args:
        num_inputs, num_targets: Widths of the rows of inputs and targets.
    """

    def __init__(self, num_inputs: int, num_targets: int) -> None:
        self._moments = torch.zeros(num_inputs, num_inputs, dtype=torch.float64)
        self._cross = torch.zeros(num_inputs, num_targets, dtype=torch.float64)
        self._rows = 0

    def add(self, inputs: Tensor, targets: Tensor) -> None:
        """Adds rows: [rows, num_inputs] and [rows, num_targets], both float32."""
        self._rows += len(inputs)
        self._moments += inputs.T @ inputs
        self._cross += inputs.T @ targets

    @property
    def covariance(self) -> Tensor:
        """Second moment E[x x'] of the inputs, [num_inputs, num_inputs] float64."""
        return self._moments / self._rows

    def solve(self, start: Tensor, prior_rows: float) -> Tensor:
        """Minimises ``|inputs W' - targets|^2 + prior_rows * s * |W - start|^2``; s is the mean square of an input.

        Args:
            start: [num_targets, num_inputs]; the prior for W.
            prior_rows: Weight of the prior, in rows of independent inputs.

        Returns:
            W, [num_targets, num_inputs] float32; not finite if the rows are not finite.
        """
        residual = self._cross - self._moments @ start.T.double()
        damped = self._moments.clone()
        diagonal = damped.diagonal()
        diagonal += max(prior_rows / self._rows * float(diagonal.mean()), torch.finfo(torch.float64).tiny)
        factor, failed = torch.linalg.cholesky_ex(damped)
        if failed:
            return torch.full_like(start, torch.nan)
        return start + torch.cholesky_solve(residual, factor).T.float()

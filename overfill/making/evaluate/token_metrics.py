"""Average per-token numbers over many answers, overall and by position, with standard errors. Knows no models.

Positions count from 0 and fall into buckets 0, 1, 2-3, 4-7, 8-15 and so on. The logarithmic scale shows drift within an
answer, and every bucket has many tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_BUCKETS = 32  # answers of up to 2^31 tokens


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over ``count`` tokens.

    Attributes:
        standard_error: Standard error over answers, because tokens of one answer are not independent; 0 for one answer.
    """

    mean: float
    standard_error: float
    count: int

    def to_json(self) -> dict[str, float | int | None]:
        """Returns plain values; the mean is None if there are no tokens."""
        return {"mean": finite_or_none(self.mean), "standard_error": self.standard_error, "count": self.count}


@dataclass(frozen=True, slots=True)
class PositionBucket:
    """The estimate for positions ``first`` to ``last`` of the answers, inclusive."""

    first: int
    last: int
    estimate: Estimate


@dataclass(frozen=True, slots=True)
class Metric:
    """Means of one number per token. ``by_position`` leaves out buckets without tokens."""

    overall: Estimate
    by_position: tuple[PositionBucket, ...]

    def to_json(self) -> dict[str, Any]:
        """Returns ``{"mean", "standard_error", "count", "by_position": [{"first", "last", "mean", …}]}``."""
        buckets = [{"first": b.first, "last": b.last, **b.estimate.to_json()} for b in self.by_position]
        return {**self.overall.to_json(), "by_position": buckets}


class MetricAccumulator:
    """Collects one number per token, answer by answer. Stores a sum and a count per answer and bucket."""

    def __init__(self) -> None:
        self._sums: list[Tensor] = []
        self._counts: list[Tensor] = []

    def add(self, values: Tensor | Sequence[float], first: int) -> None:
        """Adds ``values`` [n], which belong to consecutive tokens of one answer from position ``first``."""
        values = torch.as_tensor(values, dtype=torch.float64).cpu()
        buckets = torch.tensor([p.bit_length() for p in range(first, first + len(values))], dtype=torch.int64)
        self._sums.append(torch.zeros(_BUCKETS, dtype=torch.float64).index_add_(0, buckets, values))
        self._counts.append(torch.bincount(buckets, minlength=_BUCKETS))

    def metric(self) -> Metric:
        """Returns the means so far; NaN if there are no tokens."""
        if not self._sums:
            return Metric(Estimate(math.nan, 0.0, 0), ())
        sums, counts = torch.stack(self._sums), torch.stack(self._counts)
        buckets = [
            PositionBucket(_first(i), (1 << i) - 1, _estimate(sums[:, i], counts[:, i]))
            for i in range(_BUCKETS)
            if counts[:, i].any()
        ]
        return Metric(_estimate(sums.sum(1), counts.sum(1)), tuple(buckets))


def finite_or_none(value: float) -> float | None:
    """Returns ``value``, or None for NaN and infinities, which JSON cannot express."""
    return value if math.isfinite(value) else None


def _first(bucket: int) -> int:
    return (1 << bucket) >> 1


def _estimate(sums: Tensor, counts: Tensor) -> Estimate:
    """Computes the ratio estimator of [answers] sums and counts; its error comes from the answers' residuals."""
    present = counts > 0
    sums, counts = sums[present], counts[present]
    total, answers = int(counts.sum()), len(counts)
    if not total:
        return Estimate(math.nan, 0.0, 0)
    mean = float(sums.sum()) / total
    residuals = float((sums - mean * counts).square().sum())
    error = math.sqrt(residuals * answers / (answers - 1)) / total if answers > 1 else 0.0
    return Estimate(mean, error, total)

"""Average numbers over many answers, overall, by position and by kind, with standard errors. Knows no models.

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
    """Means of one number per token.

    Attributes:
        by_position: Leaves out buckets without tokens.
        by_kind: Kind of conversation and its estimate, in order of appearance.
    """

    overall: Estimate
    by_position: tuple[PositionBucket, ...]
    by_kind: tuple[tuple[str, Estimate], ...] = ()

    def of_kind(self, kind: str) -> Estimate:
        """Returns the estimate of one kind; NaN if no answer of it was added."""
        return dict(self.by_kind).get(kind, Estimate(math.nan, 0.0, 0))

    def to_json(self) -> dict[str, Any]:
        """Returns ``{"mean", "standard_error", "count", "by_position": [{"first", …}], "by_kind": {kind: {…}}}``."""
        buckets = [{"first": b.first, "last": b.last, **b.estimate.to_json()} for b in self.by_position]
        kinds = {kind: estimate.to_json() for kind, estimate in self.by_kind}
        return {**self.overall.to_json(), "by_position": buckets, "by_kind": kinds}


class MetricAccumulator:
    """Collects one number per token, answer by answer. Stores a sum and a count per answer and bucket."""

    def __init__(self) -> None:
        self._sums: list[Tensor] = []
        self._counts: list[Tensor] = []
        self._kinds: list[str] = []

    def add(self, values: Tensor | Sequence[float], first: int, kind: str = "") -> None:
        """Adds ``values`` [n], which belong to consecutive tokens of one answer from position ``first``."""
        values = torch.as_tensor(values, dtype=torch.float64).cpu()
        buckets = torch.tensor([p.bit_length() for p in range(first, first + len(values))], dtype=torch.int64)
        self._sums.append(torch.zeros(_BUCKETS, dtype=torch.float64).index_add_(0, buckets, values))
        self._counts.append(torch.bincount(buckets, minlength=_BUCKETS))
        self._kinds.append(kind)

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
        sums, counts = sums.sum(1), counts.sum(1)
        rows = {kind: torch.tensor([own == kind for own in self._kinds]) for kind in dict.fromkeys(self._kinds)}
        by_kind = [(kind, _estimate(sums[chosen], counts[chosen])) for kind, chosen in rows.items() if kind]
        return Metric(_estimate(sums, counts), tuple(buckets), tuple(by_kind))


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

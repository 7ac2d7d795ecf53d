"""Histogram with logarithmic buckets, each 1 % wide: percentiles of many values in little memory."""

from __future__ import annotations

import math

_BASE = math.log(1.01)


class Histogram:
    """Counts positive values. A percentile is within 0.5 % of an added value."""

    def __init__(self) -> None:
        self._counts: dict[int, int] = {}
        self.total = 0

    def add(self, value: float, count: int = 1) -> None:
        if count <= 0:
            return
        bucket = round(math.log(max(value, 1e-9)) / _BASE)
        self._counts[bucket] = self._counts.get(bucket, 0) + count
        self.total += count

    def percentile(self, percent: float) -> float:
        """Returns the value that ``percent`` of all values do not exceed. Raises ValueError without values."""
        rank, seen = percent / 100 * self.total, 0
        for bucket in sorted(self._counts):
            seen += self._counts[bucket]
            if seen >= rank:
                return math.exp(bucket * _BASE)
        raise ValueError("a histogram without values has no percentiles")

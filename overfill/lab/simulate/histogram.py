"""Percentiles of very many values in little memory: counts in buckets a hundredth wide."""

from __future__ import annotations

import math

_BASE = math.log(1.01)


class Histogram:
    """Positive values; a percentile is within 0.5 % of a value that was added."""

    def __init__(self) -> None:
        self._counts: dict[int, int] = {}
        self.total = 0

    def add(self, value: float, count: int = 1) -> None:
        if count <= 0:
            return
        bucket = round(math.log(max(value, 1e-9)) / _BASE)
        self._counts[bucket] = self._counts.get(bucket, 0) + count
        self.total += count

    def percentile(self, share: float) -> float | None:
        """The value that ``share`` (0 to 1) of all are not above; None when there is none."""
        wanted, seen = share * self.total, 0
        for bucket in sorted(self._counts):
            seen += self._counts[bucket]
            if seen >= wanted:
                return math.exp(bucket * _BASE)
        return None

"""Capacity of one worker: prefill tokens per second and seconds per decode step, learned from a prior on.

A decode step costs base + per_sequence x batch + per_kv_token x tokens attended to: each step reads the weights once,
does some work per sequence, and reads every sequence's KV. Priors come from ``overfill bench`` or the bound model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

# One step, tens of sequences, tens of thousands of tokens: scales the features of a step to the order of 1.
_SCALE = (1.0, 1 / 16, 1 / 32768)
_FEATURES = range(3)


@dataclass(frozen=True, slots=True)
class StepCost:
    """Seconds of a decode step: ``base + per_sequence * batch + per_kv_token * batch * context``."""

    base: float
    per_sequence: float
    per_kv_token: float

    def seconds(self, batch: float, context: float) -> float:
        return self.base + batch * (self.per_sequence + self.per_kv_token * context)

    def batch_within(self, seconds: float, context: float, max_batch: float) -> float:
        """Returns the largest batch whose step takes at most ``seconds``, between 1 and ``max_batch``."""
        slope = self.per_sequence + self.per_kv_token * context
        if slope <= 0:
            return max_batch if self.base <= seconds else 1.0
        return min(max_batch, max(1.0, (seconds - self.base) / slope))


class PrefillRate:
    """Prompt tokens that one busy worker computes per second.

    Args:
        prior: tokens per second assumed at first; it counts as ``weight`` seconds of work.
        memory: seconds of work after which an observation counts for 1/e.
    """

    def __init__(self, prior: float, memory: float = 120.0, weight: float = 2.0) -> None:
        self._memory = memory
        self._tokens, self._seconds = prior * weight, weight

    def add(self, tokens: float, seconds: float) -> None:
        """A worker computed ``tokens`` in ``seconds`` of work."""
        if seconds <= 0 or tokens <= 0:
            return
        fade = math.exp(-seconds / self._memory)
        self._tokens = self._tokens * fade + tokens
        self._seconds = self._seconds * fade + seconds

    @property
    def value(self) -> float:
        return self._tokens / self._seconds


class StepTime:
    """Fits ``StepCost`` to measured steps: least squares with forgetting, regularised towards a prior.

    The prior counts as ``weight`` observations at every typical size. Coefficients on which the measurements say
    nothing keep the prior's value; a constant batch, for instance, says nothing about the slope.
    """

    def __init__(self, prior: StepCost, *, weight: float = 10.0, memory: float = 500.0) -> None:
        self._prior = prior
        self._fade = 1 - 1 / memory
        priors = (prior.base, prior.per_sequence, prior.per_kv_token)
        self._ridge = weight
        self._pull = [weight * value / scale for value, scale in zip(priors, _SCALE, strict=True)]
        self._gram = [[0.0] * 3 for _ in _FEATURES]
        self._moment = [0.0] * 3

    def add(self, batch: float, context: float, seconds: float) -> None:
        """Adds a step, or the mean of several: ``batch`` sequences of ``context`` tokens took ``seconds``."""
        if seconds <= 0 or batch <= 0:
            return
        x = [scale * value for scale, value in zip(_SCALE, (1.0, batch, batch * context), strict=True)]
        for i in _FEATURES:
            self._moment[i] = self._moment[i] * self._fade + x[i] * seconds
            for j in _FEATURES:
                self._gram[i][j] = self._gram[i][j] * self._fade + x[i] * x[j]

    def cost(self) -> StepCost:
        """Returns the current estimate; no coefficient is negative."""
        weights = [0.0] * 3
        active = list(_FEATURES)
        while active:  # fix negative coefficients at 0 and fit the others again
            left = [[self._gram[i][j] + self._ridge * (i == j) for j in active] for i in active]
            part = _solve(left, [self._moment[i] + self._pull[i] for i in active])
            if min(part) >= 0:
                for index, value in zip(active, part, strict=True):
                    weights[index] = value
                break
            active = [index for index, value in zip(active, part, strict=True) if value >= 0]
        return StepCost(*(value * scale for value, scale in zip(weights, _SCALE, strict=True)))


def _solve(left: Sequence[Sequence[float]], right: Sequence[float]) -> list[float]:
    """Returns x with ``left @ x == right``; ``left`` is symmetric and positive definite.

    Plain Python, because the router's image does without numpy, which would be a third of it.
    """
    rows = [[*row, value] for row, value in zip(left, right, strict=True)]
    for index, pivot in enumerate(rows):
        for other in rows[index + 1 :]:
            factor = other[index] / pivot[index]
            other[:] = [a - factor * b for a, b in zip(other, pivot, strict=True)]
    solution = [0.0] * len(rows)
    for index in reversed(range(len(rows))):
        known = sum(rows[index][later] * solution[later] for later in range(index + 1, len(rows)))
        solution[index] = (rows[index][-1] - known) / rows[index][index]
    return solution

"""Capacity of one worker: prefill tokens per second and seconds per decode step, learned from a prior on.

A decode step costs base + per_sequence x batch + per_kv_token x tokens attended to: each step reads the weights once,
does some work per sequence, and reads every sequence's KV. Priors come from ``overfill bench`` or the bound model.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np


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
        # Features scaled to the order of 1: one step, tens of sequences, tens of thousands of tokens.
        self._scale = np.array([1.0, 1 / 16, 1 / 32768])
        self._prior_weights = np.array([prior.base, prior.per_sequence, prior.per_kv_token]) / self._scale
        self._ridge = weight * np.eye(3)
        self._gram = np.zeros((3, 3))
        self._moment = np.zeros(3)

    def add(self, batch: float, context: float, seconds: float) -> None:
        """Adds a step, or the mean of several: ``batch`` sequences of ``context`` tokens took ``seconds``."""
        if seconds <= 0 or batch <= 0:
            return
        x = self._scale * (1.0, batch, batch * context)
        self._gram = self._gram * self._fade + np.outer(x, x)
        self._moment = self._moment * self._fade + x * seconds

    def cost(self) -> StepCost:
        """Returns the current estimate; no coefficient is negative."""
        left = self._gram + self._ridge
        right = self._moment + self._ridge @ self._prior_weights
        weights = np.zeros(3)
        active = [0, 1, 2]
        while active:  # fix negative coefficients at 0 and fit the others again
            part = np.linalg.solve(left[np.ix_(active, active)], right[active])
            if (part >= 0).all():
                weights[active] = part
                break
            active = [index for index, value in zip(active, part, strict=True) if value >= 0]
        base, per_sequence, per_kv_token = (float(value) for value in weights * self._scale)
        return StepCost(base, per_sequence, per_kv_token)

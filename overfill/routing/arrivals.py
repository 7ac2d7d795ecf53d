"""Load on the pools: arrival rates and answer lengths over sliding windows. No clock, no I/O.

``now`` is in seconds, monotonic, and never goes back.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass

_BUCKET = 1.0  # seconds that one bucket of arrivals covers


@dataclass(frozen=True, slots=True)
class Rate:
    """Arrivals per second and their prompt tokens.

    Attributes:
        arrivals: requests per second.
        tokens: prompt tokens to compute per second, without those in the prefix cache.
        recent_tokens: the same over the short window alone.
        rising: True if the short window exceeds the long one by more than chance explains. ``arrivals`` and
            ``tokens`` are then those of the short window, where they are larger.
        mean_tokens: prompt tokens to compute per request.
        scv: squared coefficient of variation of the tokens per request.
    """

    arrivals: float
    tokens: float
    recent_tokens: float
    rising: bool
    mean_tokens: float
    scv: float


class Arrivals:
    """Requests and prompt tokens over a long and a short window.

    The long window normally gives the rate. The short one takes over when it exceeds the long window's expectation by
    ``significance`` standard deviations of a compound Poisson process. So growth shows within seconds, and random
    variation does not look like growth.
    """

    def __init__(self, short: float, long: float, significance: float) -> None:
        self._short, self._long, self._significance = short, long, significance
        self._buckets: deque[list[float]] = deque()  # [start, requests, tokens, tokens squared]
        self._first: float | None = None

    def add(self, now: float, tokens: int) -> None:
        """Counts a request with ``tokens`` prompt tokens to compute."""
        if self._first is None:
            self._first = now
        start = math.floor(now / _BUCKET) * _BUCKET
        if not self._buckets or self._buckets[-1][0] < start:
            self._buckets.append([start, 0.0, 0.0, 0.0])
        bucket = self._buckets[-1]
        bucket[1] += 1
        bucket[2] += tokens
        bucket[3] += float(tokens) * tokens

    def rate(self, now: float) -> Rate:
        """Returns the rates at ``now``."""
        while self._buckets and self._buckets[0][0] < now - self._long:
            self._buckets.popleft()
        if self._first is None or not self._buckets:
            return Rate(0.0, 0.0, 0.0, False, 0.0, 0.0)
        # Load before the first request is unknown, not zero.
        long = max(self._short, min(self._long, now - self._first))
        count, tokens, squares = (sum(bucket[i] for bucket in self._buckets) for i in (1, 2, 3))
        recent = [bucket for bucket in self._buckets if bucket[0] >= now - self._short]
        recent_count, recent_tokens = (sum(bucket[i] for bucket in recent) for i in (1, 2))
        mean = tokens / count
        scv = max(0.0, squares / count / mean**2 - 1) if mean else 0.0
        share = self._short / long
        chance = self._significance * math.sqrt(squares * share)
        rising = recent_tokens > tokens * share + chance or recent_count > count * share + self._significance * (
            math.sqrt(count * share)
        )
        rates = [count / long, tokens / long]
        if rising:
            rates = [max(rates[0], recent_count / self._short), max(rates[1], recent_tokens / self._short)]
        return Rate(rates[0], rates[1], recent_tokens / self._short, rising, mean, scv)


@dataclass(frozen=True, slots=True)
class AnswerShape:
    """Means over finished requests.

    Attributes:
        tokens: tokens per answer.
        context: tokens that a decode step attends to per sequence. Each request is weighted by the length of its
            answer, because long answers are in more steps than short ones.
    """

    tokens: float
    context: float


class AnswerLengths:
    """Mean lengths of finished requests, weighted by exp(-age / ``memory``), ``memory`` in seconds.

    The total weight never falls below ``_MIN_WEIGHT`` requests, so that an idle hour does not erase the estimate.
    """

    _MIN_WEIGHT = 50.0

    def __init__(self, memory: float, prior_prompt: float, prior_answer: float) -> None:
        self._memory = memory
        self._at = -math.inf
        # Weight, answer, prompt x answer, answer squared. The prior counts as 5 requests.
        self._sums = [w * 5.0 for w in (1.0, prior_answer, prior_prompt * prior_answer, prior_answer**2)]

    def add(self, now: float, prompt_tokens: int, answer_tokens: int) -> None:
        if self._sums[0] > self._MIN_WEIGHT:
            fade = max(math.exp(-max(0.0, now - self._at) / self._memory), self._MIN_WEIGHT / self._sums[0])
            self._sums = [value * fade for value in self._sums]
        self._at = now
        answer = float(max(1, answer_tokens))
        for index, value in enumerate((1.0, answer, prompt_tokens * answer, answer * answer)):
            self._sums[index] += value

    def shape(self) -> AnswerShape:
        weight, answer, prompt_answer, squares = self._sums
        return AnswerShape(answer / weight, (prompt_answer + squares / 2) / answer)

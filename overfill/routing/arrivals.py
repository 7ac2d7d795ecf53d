"""What is asked of the pools: rates of arrivals and lengths of answers, over sliding windows. No clock, no I/O.

``now`` is in seconds, monotonic, and never goes back.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass

_BUCKET = 1.0  # seconds that one bucket of arrivals covers


@dataclass(frozen=True, slots=True)
class Rate:
    """Arrivals per second and what they bring.

    Attributes:
        arrivals: requests per second.
        tokens: prompt tokens to be computed per second, those in the prefix cache left out.
        recent_tokens: the same over the short window alone.
        rising: the short window is above the long one by more than chance explains, so ``arrivals`` and
            ``tokens`` are the short one's.
        mean_tokens: per request.
        scv: squared coefficient of variation of a request's tokens.
    """

    arrivals: float
    tokens: float
    recent_tokens: float
    rising: bool
    mean_tokens: float
    scv: float


class Arrivals:
    """Requests and prompt tokens over a long and a short window.

    The long one is what load is judged by. The short one takes over when it brings more than the long one lets
    expect, by ``significance`` standard deviations of a compound Poisson process: growth is seen within seconds,
    and chance is not taken for it.
    """

    def __init__(self, short: float, long: float, significance: float) -> None:
        self._short, self._long, self._significance = short, long, significance
        self._buckets: deque[list[float]] = deque()  # [start, requests, tokens, tokens squared]
        self._first: float | None = None

    def add(self, now: float, tokens: int) -> None:
        """A request came whose prompt has ``tokens`` tokens to be computed."""
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
        """As of ``now``."""
        while self._buckets and self._buckets[0][0] < now - self._long:
            self._buckets.popleft()
        if self._first is None or not self._buckets:
            return Rate(0.0, 0.0, 0.0, False, 0.0, 0.0)
        # What came before the first request is not known to have been nothing.
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
        tokens: of an answer.
        context: tokens that a decode step attends to for one sequence: long answers are running more often than
            short ones, so each request counts as much as its answer is long.
    """

    tokens: float
    context: float


class AnswerLengths:
    """Lengths of finished requests, older ones fading with ``memory`` seconds.

    The last ``_MIN_WEIGHT`` requests never fade, so that an idle hour does not undo what is known.
    """

    _MIN_WEIGHT = 50.0

    def __init__(self, memory: float, prior_prompt: float, prior_answer: float) -> None:
        self._memory = memory
        self._at = -math.inf
        # Weight, answer, prompt x answer, answer squared. What is believed at first counts as a few requests.
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

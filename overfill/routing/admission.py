"""Which new requests are taken at all: bounded queues, deadlines, limits of API keys. Plain bookkeeping, no clock.

A refusal comes at once and says when to try again; both rest on how fast the queue was seen to drain.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass

from overfill.errors import InvalidRequest, Overloaded

MOST_RETRY_AFTER = 60.0
"""Seconds that a client is told to wait at most."""

_MEMORY = 10.0  # seconds with a queue after which what was seen counts for 1/e
_ENOUGH = 4.0  # departures before a rate is believed
_UNKNOWN = 1.0  # seconds to wait when nothing is known


class DrainRate:
    """How many requests per second leave the queue while there is one; idle time says nothing about it."""

    def __init__(self) -> None:
        self._left = 0.0
        self._seconds = 0.0
        self._since: float | None = None  # when the queue was last looked at, if there was one
        self._stood = 0.0  # seconds with a queue since the last departure
        self._gaps = 0.0  # sum of squares of such times

    def look(self, now: float, queue: int) -> None:
        """There are ``queue`` requests in the queue now. To be called whenever that may have changed."""
        if self._since is not None and now > self._since:
            passed = now - self._since
            fade = math.exp(-passed / _MEMORY)
            self._left *= fade
            self._gaps *= fade
            self._seconds = self._seconds * fade + _MEMORY * (1 - fade)
            self._stood += passed
        self._since = now if queue else None

    def departed(self) -> None:
        """A request that had to wait has got its place."""
        self._left += 1
        self._gaps += self._stood * self._stood
        self._stood = 0.0

    def wait(self, ahead: int) -> float | None:
        """Seconds until a request with so many ahead of it has a place; None while that is not known."""
        if not ahead:
            return 0.0
        if self._seconds <= 0 or (self._left < _ENOUGH and self._seconds < _MEMORY / 2):
            return None
        return math.inf if self._left < 1e-9 else ahead * self._seconds / self._left

    @property
    def clump(self) -> float:
        """Seconds between departures, as one who comes at any moment finds them: long where several leave together."""
        return self._gaps / self._seconds if self._seconds > 0 else 0.0


class Admission:
    """Decides about new requests.

    Args:
        max_queue: most requests of one priority that wait for a decode worker.
        max_wait: seconds of waiting, as far as can be told, beyond which a request is not taken; None: any.

    Attributes:
        drain: how fast the queue drains.
    """

    def __init__(self, max_queue: int, max_wait: float | None = None) -> None:
        self._max_queue = max_queue
        self._max_wait = max_wait
        self._first_tokens: deque[float] = deque(maxlen=64)
        self.drain = DrainRate()

    def first_token(self, seconds: float) -> None:
        """A request had its first token so long after it got its place."""
        self._first_tokens.append(seconds)

    def check(self, waiting: int, ahead: int, now: float, deadline: float | None, *, begun: bool = False) -> None:
        """Refuses a new request, or not.

        An answer that a lost router had begun is not to end because this one's queue is slow, nor because it is full of
        new requests: it is refused only once the queue is twice as long.

        Args:
            waiting: requests of its priority that wait.
            ahead: requests that would go before it.
            now, deadline: on one clock, seconds.
            begun: its client has part of the answer, or says so.

        Raises:
            Overloaded: the queue is full, or too slow for it.
        """
        wait = self.drain.wait(ahead)
        if waiting >= self._max_queue * (2 if begun else 1):
            half = None if wait is None else wait / 2
            raise Overloaded(
                f"{waiting} requests are waiting, which is the most of one priority that this router queues",
                _retry_after(half),
                "queue_full",
            )
        if begun or not wait:
            return
        # The quickest of late is what no request beats; without a queue nothing is refused, so it cannot stick.
        least = wait + min(self._first_tokens, default=0.0)
        if deadline is not None and now + least > deadline:
            raise Overloaded(
                f"{ahead} requests go first, which takes about {_seconds(wait)}; the deadline is in "
                f"{max(0.0, deadline - now):.3g} s",
                _retry_after(now + least - deadline),
                "deadline",
            )
        # What is taken is to keep it, so where requests leave in clumps the whole wait for the next one counts.
        if self._max_wait is not None and wait + self.drain.clump > self._max_wait:
            longest = wait + self.drain.clump
            raise Overloaded(
                f"{ahead} requests go first, which takes up to {_seconds(longest)}; the most here is "
                f"{self._max_wait:g} s",
                _retry_after(longest - self._max_wait),
                "max_wait",
            )


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits of one API key; None is no limit.

    Attributes:
        name: how errors name the key.
        rate: requests per second; as many, and one at least, may come at once after a pause.
        concurrency: requests at once.
    """

    name: str
    rate: float | None = None
    concurrency: int | None = None


@dataclass(slots=True)
class _Usage:
    running: int = 0
    tokens: float = 0.0  # requests that may come at once
    at: float | None = None


class KeyLimits:
    """Holds keys to their limits, on this router."""

    def __init__(self) -> None:
        self._usage: dict[str, _Usage] = {}

    def check(self, key: str, limits: Limits, now: float, count: int = 1) -> None:
        """Whether ``count`` requests of ``key`` may begin together now. ``key`` is no name: see ``ApiKey.id``.

        Raises:
            InvalidRequest: so many never may.
            Overloaded: they are too many now.
        """
        usage = self._usage.setdefault(key, _Usage())
        burst = math.inf if limits.rate is None else max(1.0, limits.rate)
        most = min(burst, math.inf if limits.concurrency is None else limits.concurrency)
        if count > most:
            raise InvalidRequest(
                "n", f"asks for {count} answers, each a request; API key {limits.name!r} may have {int(most)}"
            )
        if limits.concurrency is not None and usage.running + count > limits.concurrency:
            raise Overloaded(
                f"API key {limits.name!r} has {usage.running} request{'s' * (usage.running != 1)} running; "
                f"its limit is {limits.concurrency}",
                _UNKNOWN,
                "key_concurrency",
            )
        if limits.rate is not None:
            passed = burst if usage.at is None else (now - usage.at) * limits.rate
            usage.tokens, usage.at = min(burst, usage.tokens + passed), now
            if usage.tokens < count:
                raise Overloaded(
                    f"API key {limits.name!r} may ask {limits.rate:g} times a second",
                    _retry_after((count - usage.tokens) / limits.rate),
                    "key_rate",
                )

    def enter(self, key: str, limits: Limits, now: float, count: int = 1) -> None:
        """``count`` requests of ``key`` begin; as many ``leave`` must follow. Raises as ``check``."""
        self.check(key, limits, now, count)
        usage = self._usage[key]
        usage.running += count
        if limits.rate is not None:
            usage.tokens -= count

    def leave(self, key: str) -> None:
        """A request of ``key`` has ended."""
        self._usage[key].running -= 1


def _retry_after(seconds: float | None) -> float:
    return _UNKNOWN if seconds is None else min(MOST_RETRY_AFTER, max(0.05, seconds))


def _seconds(value: float) -> str:
    return "for ever at the moment" if math.isinf(value) else f"{value:.3g} s"

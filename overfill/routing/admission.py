"""Admission of new requests: bounded queues, deadlines and the quotas of API keys. Plain bookkeeping, no clock.

The router refuses a request at once and says when to try again. It estimates waits from the rate at which requests
have left the queue.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

from overfill.errors import InvalidRequest, Overloaded

MAX_RETRY_AFTER = 60.0
"""Upper limit of the retry delay that a client is given, in seconds."""

_MEMORY = 10.0  # seconds with a queue after which an observation counts for 1/e
_ENOUGH = 4.0  # departures needed before the rate is used
_UNKNOWN = 1.0  # retry delay in seconds when no wait can be estimated
_ROUNDING = 1e-6  # part of a request that rounding of times may hide


class QueueDepartureRate:
    """Estimates how many requests per second leave the queue. Time with an empty queue is not counted."""

    def __init__(self) -> None:
        self._left = 0.0
        self._seconds = 0.0
        self._since: float | None = None  # time of the last observation; None if the queue was empty
        self._since_departure = 0.0  # seconds with a queue since the last departure
        self._gaps = 0.0  # sum of the squares of ``_since_departure`` at each departure

    def observe(self, now: float, queue: int) -> None:
        """Records that ``queue`` requests wait now. Call it whenever that may have changed."""
        if self._since is not None and now > self._since:
            passed = now - self._since
            fade = math.exp(-passed / _MEMORY)
            self._left *= fade
            self._gaps *= fade
            self._seconds = self._seconds * fade + _MEMORY * (1 - fade)
            self._since_departure += passed
        self._since = now if queue else None

    def departed(self) -> None:
        """Records that a request which had to wait has been placed on a worker."""
        self._left += 1
        self._gaps += self._since_departure * self._since_departure
        self._since_departure = 0.0

    def expected_wait(self, ahead: int) -> float | None:
        """Returns the seconds until a request behind ``ahead`` others is placed; None while that is unknown."""
        if not ahead:
            return 0.0
        if self._seconds <= 0 or (self._left < _ENOUGH and self._seconds < _MEMORY / 2):
            return None
        return math.inf if self._left < 1e-9 else ahead * self._seconds / self._left

    @property
    def expected_gap(self) -> float:
        """Expected length of the gap between departures in which a request arrives, in seconds.

        It is length-biased: requests that leave in bursts make it longer than the mean gap.
        """
        return self._gaps / self._seconds if self._seconds > 0 else 0.0


class Admission:
    """Admits or refuses new requests.

    Args:
        max_queue: maximum number of waiting requests of one priority.
        max_wait: longest expected wait in seconds with which a request is admitted. None means no limit.

    Attributes:
        departure_rate: rate at which requests leave the queue for decode workers.
    """

    def __init__(self, max_queue: int, max_wait: float | None = None) -> None:
        self._max_queue = max_queue
        self._max_wait = max_wait
        self._first_tokens: deque[float] = deque(maxlen=64)
        self.departure_rate = QueueDepartureRate()

    def first_token(self, seconds: float) -> None:
        """Records the seconds between a request's placement and its first token."""
        self._first_tokens.append(seconds)

    def expected_ttft(self, ahead: int) -> float | None:
        """Returns the seconds until the first token of a request behind ``ahead`` others; None while unknown."""
        wait = self.departure_rate.expected_wait(ahead)
        if wait is None:
            return None
        return wait + self.median_first_token

    @property
    def median_first_token(self) -> float:
        """Median of the recent times from placement to first token, in seconds; 0 while unknown."""
        return median(self._first_tokens) if self._first_tokens else 0.0

    def check(
        self,
        waiting: int,
        ahead: int,
        now: float,
        deadline: float | None,
        own: int = 0,
        *,
        client_resumes: bool = False,
    ) -> None:
        """Raises unless a new request can be admitted.

        A client that resumes an answer after losing its router may join a queue twice as long as ``max_queue``, and
        ``max_wait`` does not refuse it, so that the answer survives the router. Its deadline refuses it like any other
        request: an answer that comes too late does not survive either.

        Args:
            waiting: waiting requests of its priority.
            ahead: requests that would go before it.
            now, deadline: seconds on the same clock.
            own: waiting requests of its priority and API key; 0 without keys. A key may have as many as there are free
                places. So one key fills at most half of the queue, and others find a place.
            client_resumes: True if the client says that it has part of the answer already.

        Raises:
            Overloaded: the queue is full, or too slow for this request.
        """
        wait = self.departure_rate.expected_wait(ahead)
        max_queue = self._max_queue * (2 if client_resumes else 1)
        half = None if wait is None else wait / 2
        if waiting >= max_queue:
            raise Overloaded(
                f"{waiting} requests are waiting; this router queues at most {max_queue} of this priority",
                _retry_after(half),
                "queue_full",
            )
        if own and waiting + own >= max_queue:
            raise Overloaded(
                f"{own} requests of this API key are waiting, and {max_queue - waiting} places of {max_queue} are "
                "free; a key may have as many as are free",
                _retry_after(half),
                "queue_full",
            )
        if not wait:
            return
        # Lower bound on the time to first token: the shortest recent one. The check applies only while a queue
        # exists, so a bound that is too high refuses requests only until the queue is empty.
        ttft_bound = wait + min(self._first_tokens, default=0.0)
        if deadline is not None and now + ttft_bound > deadline:
            raise Overloaded(
                f"{ahead} requests go first; the expected wait is {_duration(wait)}, the deadline in "
                f"{max(0.0, deadline - now):.3g} s",
                _retry_after(now + ttft_bound - deadline),
                "deadline",
            )
        # An admitted request must stay within max_wait. Requests may leave the queue in bursts, so add the whole
        # expected gap until the next departure.
        longest = wait + self.departure_rate.expected_gap
        if self._max_wait is not None and longest > self._max_wait and not client_resumes:
            raise Overloaded(
                f"{ahead} requests go first; the expected wait is up to {_duration(longest)}, the limit "
                f"{self._max_wait:g} s",
                _retry_after(longest - self._max_wait),
                "max_wait",
            )


@dataclass(frozen=True, slots=True)
class KeyQuota:
    """Limits of one API key. None means no limit.

    Attributes:
        name: name of the key in error messages.
        rate: requests per second. After a pause, a burst of as many requests, and at least one, is admitted.
        concurrency: maximum number of running requests.
    """

    name: str
    rate: float | None = None
    concurrency: int | None = None


class KeyUsage:
    """How much of its quota one API key uses.

    Attributes:
        running: requests of the key that run on this router.
        spent_until: time at which a pause will have restored the key's whole burst. Other processes may change it too.
    """

    running: int = 0
    spent_until: float = 0.0

    @property
    def running_elsewhere(self) -> int:
        """Requests of the key that run on other processes which count together with this router."""
        return 0


class KeyLimiter:
    """Holds the API keys to their quotas on this router, and on all that share its usage.

    Args:
        usage_of: returns the usage of a key from its id; called once per key.
    """

    def __init__(self, usage_of: Callable[[str], KeyUsage] = lambda key: KeyUsage()) -> None:
        self._usage_of = usage_of
        self._usage: dict[str, KeyUsage] = {}

    def acquire(self, key: str, quota: KeyQuota, now: float, count: int = 1, before: int = 0) -> None:
        """Counts ``count`` requests of ``key`` as running, all or none. Call ``release`` once for each.

        Args:
            key: ``ApiKey.id``, not the name.
            before: number of answers to the same client request that are counted already.

        Raises:
            InvalidRequest: the quota never admits ``count`` requests at once.
            Overloaded: the quota does not admit them now.
        """
        usage = self._usage.get(key)
        if usage is None:
            usage = self._usage[key] = self._usage_of(key)
        burst = math.inf if quota.rate is None else max(1.0, quota.rate)
        max_count = min(burst, math.inf if quota.concurrency is None else quota.concurrency)
        if before + count > max_count:
            raise InvalidRequest(
                "n",
                f"asks for {before + count} answers; API key {quota.name!r} may start at most {int(max_count)} "
                "at once, and each answer counts as a request",
            )
        if quota.concurrency is not None:
            running = usage.running + usage.running_elsewhere
            if running + count > quota.concurrency:
                raise Overloaded(
                    f"API key {quota.name!r} has {running} request{'s' * (running != 1)} running; "
                    f"its limit is {quota.concurrency}",
                    _UNKNOWN,
                    "key_concurrency",
                )
        if quota.rate is not None:
            left = burst - max(0.0, usage.spent_until - now) * quota.rate
            if left < count - _ROUNDING:
                raise Overloaded(
                    f"API key {quota.name!r} has used its limit of {quota.rate:g} requests per second",
                    _retry_after((count - left) / quota.rate),
                    "key_rate",
                )
        usage.running += count
        if quota.rate is not None:
            usage.spent_until = max(usage.spent_until, now) + count / quota.rate

    def release(self, key: str) -> None:
        """Records that a request of ``key`` has ended."""
        self._usage[key].running -= 1


def _retry_after(seconds: float | None) -> float:
    return _UNKNOWN if seconds is None else min(MAX_RETRY_AFTER, max(0.05, seconds))


def _duration(seconds: float) -> str:
    return "infinite at present" if math.isinf(seconds) else f"{seconds:.3g} s"

"""A router's last minute: tokens per second, cached tokens, and the quantiles of the answers' times. No I/O."""

from __future__ import annotations

import bisect
import itertools
import math
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence

from overfill.request.names import TTFT_PARTS
from overfill.routing.session_stats import busiest_of
from overfill.v1 import admin_pb2, inference_pb2

WINDOW = 60.0
"""Seconds for which a finished answer counts."""

RATE_SECONDS = 10
"""Seconds over which tokens per second are averaged."""

_WHOLE = ("ttft", "handoff_exposed", "decode", "total")
_NAMES = (*_WHOLE[:1], *TTFT_PARTS, "unattributed", *_WHOLE[1:], "itl")
_MAX_ANSWERS = 10_000
"""Maximum number of answers kept. If more finish in a minute, the latest are used."""

_PROMPT_COUNTS = ("prompt_tokens", "cached_tokens", "peer_tokens", "disk_tokens")
"""Fields of ``Usage`` and of ``Activity``."""

_PERCENTILES = (50, 90, 99)
_BUCKET = math.log(1.01)  # logarithm of the ratio of neighbouring buckets


class RollingStats:
    """Rolling statistics of one router, fed by its answers on one thread. ``now`` is in seconds, monotonic."""

    def __init__(self) -> None:
        self._tokens: deque[list[int]] = deque()  # second, tokens in it
        self._answers: deque[tuple[float, dict[str, int], Sequence[int]]] = deque(maxlen=_MAX_ANSWERS)

    def tokens(self, count: int, now: float) -> None:
        """Counts ``count`` tokens that the router handed to a client."""
        second = int(now)
        if self._tokens and self._tokens[-1][0] == second:
            self._tokens[-1][1] += count
            return
        self._tokens.append([second, count])
        while self._tokens[0][0] < second - RATE_SECONDS:
            self._tokens.popleft()

    def answered(self, finished: inference_pb2.Finished, now: float) -> None:
        """Counts a complete answer."""
        counts = tuple(getattr(finished.usage, name) for name in _PROMPT_COUNTS)
        self._answers.append((now, _times(finished), counts))

    def activity(self, running: int, waiting: int, now: float) -> admin_pb2.Activity:
        """Returns the statistics as the Status RPC reports them. ``running`` and ``waiting`` are requests now."""
        self._forget(now)
        # Count whole seconds only, so leave out the current one.
        last = int(now)
        tokens = sum(count for second, count in self._tokens if last - RATE_SECONDS <= second < last)
        activity = admin_pb2.Activity(
            running=running,
            waiting=waiting,
            tokens_per_second=tokens / RATE_SECONDS,
            answers=len(self._answers),
        )
        for index, name in enumerate(_PROMPT_COUNTS):
            setattr(activity, name, sum(counts[index] for _, _, counts in self._answers))
        for name in _NAMES:
            if values := sorted(times[name] for _, times, _ in self._answers if name in times):
                _add_timing(activity, name, [_rank(values, percentile) for percentile in _PERCENTILES])
        return activity

    def histograms(self, now: float) -> Iterator[admin_pb2.Histogram]:
        """Yields the times of the last minute's answers in a form that ``add_up`` adds to other routers'."""
        self._forget(now)
        for name in _NAMES:
            if counts := Counter(_bucket(times[name]) for _, times, _ in self._answers if name in times):
                yield admin_pb2.Histogram(name=name, bucket=counts.keys(), count=counts.values())

    def _forget(self, now: float) -> None:
        while self._answers and self._answers[0][0] < now - WINDOW:
            self._answers.popleft()


def add_up(activities: Iterable[admin_pb2.Activity]) -> admin_pb2.Activity:
    """Returns the activity of several routers together. Its percentiles are exact to 0.5 %, because of the buckets.

    Args:
        activities: of one router each, with ``histograms``.
    """
    activities = list(activities)
    total = admin_pb2.Activity(busiest_sessions=busiest_of(activity.busiest_sessions for activity in activities))
    times: dict[str, Counter[int]] = {name: Counter() for name in _NAMES}
    for activity in activities:
        total.running += activity.running
        total.waiting += activity.waiting
        total.tokens_per_second += activity.tokens_per_second
        total.answers += activity.answers
        total.sessions += activity.sessions
        for name in _PROMPT_COUNTS:
            setattr(total, name, getattr(total, name) + getattr(activity, name))
        for histogram in activity.histograms:
            if histogram.name in times:  # a newer router may have more times
                times[histogram.name].update(dict(zip(histogram.bucket, histogram.count, strict=True)))
    for name, counts in times.items():
        if counts:
            buckets = sorted(counts)
            ranks = list(itertools.accumulate(counts[bucket] for bucket in buckets))
            found = [buckets[bisect.bisect_left(ranks, percentile / 100 * ranks[-1])] for percentile in _PERCENTILES]
            _add_timing(total, name, [math.exp(bucket * _BUCKET) for bucket in found])
    return total


def _bucket(nanoseconds: int) -> int:
    return round(math.log(max(1, nanoseconds)) / _BUCKET)


def _add_timing(activity: admin_pb2.Activity, name: str, nanoseconds: Sequence[float]) -> None:
    p50, p90, p99 = (value / 1e9 for value in nanoseconds)
    activity.timing.add(name=name, p50_seconds=p50, p90_seconds=p90, p99_seconds=p99)


def _times(finished: inference_pb2.Finished) -> dict[str, int]:
    """Returns the nanoseconds of each time that ``finished`` holds, by name."""
    timing, completion_tokens = finished.timing, finished.usage.completion_tokens
    times = {field.name.removesuffix("_ns"): value for field, value in timing.ListFields()}
    if "ttft" in times:
        times["unattributed"] = times["ttft"] - sum(times.get(part, 0) for part in TTFT_PARTS)
        if "total" in times and completion_tokens > 1:
            times["itl"] = (times["total"] - times["ttft"]) // (completion_tokens - 1)
    return times


def _rank(ordered: Sequence[int], percentile: int) -> int:
    """Returns the percentile by nearest rank, which is always one of the values."""
    return ordered[max(0, math.ceil(percentile / 100 * len(ordered)) - 1)]

"""A router's last minute: tokens per second, and the quantiles of the answers' times. No I/O."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sequence

from overfill.v1 import admin_pb2, common_pb2, inference_pb2

WINDOW = 60.0
"""Seconds for which a finished answer counts."""

RATE_SECONDS = 10
"""Seconds over which tokens per second are averaged."""

_PARTS = ("router_queue", "decode_reservation", "prefill_queue", "prefill_compute", "return_path")
_WHOLE = ("ttft", "handoff_exposed", "decode", "total")
_MAX_ANSWERS = 10_000
"""Maximum number of answers kept. If more finish in a minute, the latest are used."""


class RollingStats:
    """Rolling statistics of one router, fed by its answers on one thread. ``now`` is in seconds, monotonic."""

    def __init__(self) -> None:
        self._tokens: deque[list[int]] = deque()  # second, tokens in it
        self._answers: deque[tuple[float, dict[str, int]]] = deque(maxlen=_MAX_ANSWERS)

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
        self._answers.append((now, dict(_times(finished))))

    def activity(self, running: int, waiting: int, now: float) -> admin_pb2.Activity:
        """Returns the statistics as the Status RPC reports them. ``running`` and ``waiting`` are requests now."""
        while self._answers and self._answers[0][0] < now - WINDOW:
            self._answers.popleft()
        # Count whole seconds only, so leave out the current one.
        last = int(now)
        tokens = sum(count for second, count in self._tokens if last - RATE_SECONDS <= second < last)
        activity = admin_pb2.Activity(
            running=running, waiting=waiting, tokens_per_second=tokens / RATE_SECONDS, answers=len(self._answers)
        )
        for name in (*_WHOLE[:1], *_PARTS, "unattributed", *_WHOLE[1:], "itl"):
            values = sorted(times[name] for _, times in self._answers if name in times)
            if values:
                p50, p90, p99 = (_rank(values, p) / 1e9 for p in (50, 90, 99))
                activity.timing.add(name=name, p50_seconds=p50, p90_seconds=p90, p99_seconds=p99)
        return activity


def _times(finished: inference_pb2.Finished) -> Iterator[tuple[str, int]]:
    """Yields the name and nanoseconds of each time that ``finished`` holds."""
    timing = finished.timing
    for name in (*_WHOLE, *_PARTS):
        if timing.HasField(f"{name}_ns"):
            yield name, getattr(timing, f"{name}_ns")
    if timing.HasField("ttft_ns"):
        yield "unattributed", timing.ttft_ns - _covered(timing)
        if timing.HasField("total_ns") and finished.usage.completion_tokens > 1:
            yield "itl", (timing.total_ns - timing.ttft_ns) // (finished.usage.completion_tokens - 1)


def _covered(timing: common_pb2.Timing) -> int:
    return sum(getattr(timing, f"{part}_ns") for part in _PARTS)


def _rank(ordered: Sequence[int], percentile: int) -> int:
    """Returns the percentile by nearest rank, which is always one of the values."""
    return ordered[max(0, math.ceil(percentile / 100 * len(ordered)) - 1)]

"""What routers tell whoever owns the workers, as flat numbers, and how those numbers feed a ``Scaler``.

Counts only ever grow, so a reader that misses some reports misses nothing; the rest is as of now. Several routers see
the same workers but different requests: counts and router queues add up, what workers report does not.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from overfill.routing.dispatcher import Dispatcher, JobState
from overfill.routing.pool import Pool, Roster
from overfill.routing.scaling import PoolState, Scaler
from overfill.v1 import inference_pb2

_FADE = 0.98  # weight of what was known of the prefix cache, when another answer is finished

COUNTS = (
    "arrivals",
    "arrived_tokens",
    "arrived_tokens_squared",
    "finished",
    "finished_prompt_tokens",
    "finished_answer_tokens",
    "timed",
    "timed_itl_seconds",
    "timed_batch",
    "prefilled_tokens",
    "prefill_seconds",
)
"""Since the router started. Tokens of arrivals are those to be computed, as far as the prefix cache is known; ``timed``
are finished answers of which ITL (mean gap between tokens) and batch (sequences beside it) are known."""


class Signals:
    """One router's numbers."""

    def __init__(self, roster: Roster, dispatcher: Dispatcher) -> None:
        self._roster = roster
        self._dispatcher = dispatcher
        self._counts = dict.fromkeys(COUNTS, 0.0)
        self._occupancy = _Occupancy()
        self._found = 0.0  # share of finished prompts that was in the prefix cache

    def arrived(self, prompt_tokens: int, now: float) -> None:
        """A request was queued. ``now`` is in seconds, monotonic, as everywhere here."""
        tokens = max(1.0, prompt_tokens * (1 - self._found))
        self._add(arrivals=1, arrived_tokens=tokens, arrived_tokens_squared=tokens * tokens)

    def finished(self, answer: inference_pb2.Finished, now: float) -> None:
        """An answer is complete."""
        usage, timing = answer.usage, answer.timing
        self._add(
            finished=1,
            finished_prompt_tokens=usage.prompt_tokens,
            finished_answer_tokens=usage.completion_tokens,
        )
        if usage.completion_tokens > 1 and timing.decode_ns:
            seconds = timing.decode_ns / 1e9
            # Over all of its time, not at its end, when those that ran beside it may have left together.
            beside = self._occupancy.mean(answer.decode_worker, now - seconds, now)
            self._add(timed=1, timed_itl_seconds=seconds / (usage.completion_tokens - 1), timed_batch=beside)
        computed = usage.prompt_tokens - usage.cached_tokens
        if computed > 0 and timing.prefill_compute_ns:
            # Prompts that share a worker's steps share its seconds.
            began = now - (timing.decode_ns + timing.prefill_compute_ns) / 1e9
            beside = self._occupancy.mean(answer.prefill_worker, began, began + timing.prefill_compute_ns / 1e9)
            self._add(prefilled_tokens=computed, prefill_seconds=timing.prefill_compute_ns / 1e9 / beside)
        if usage.prompt_tokens:
            self._found = _FADE * self._found + (1 - _FADE) * usage.cached_tokens / usage.prompt_tokens

    def read(self, now: float) -> dict[str, float]:
        """All numbers: ``COUNTS``, ``<stage>_<field of PoolState>`` of what workers report, and the router's queue.

        To be called about once a second: what runs on the workers is sampled here.
        """
        self._occupancy.sample(self._roster, now)
        numbers = dict(self._counts)
        for stage, pool in (("prefill", self._roster.prefill), ("decode", self._roster.decode)):
            numbers |= {f"{stage}_{name}": value for name, value in _reported(pool, now).items()}
        queue = list(self._dispatcher.waiting())
        return numbers | {
            "queued_jobs": float(len(queue)),
            "queued_for_decode": float(sum(job.state is JobState.WAITING for job in queue)),
            "queued_tokens": float(sum(job.prompt_tokens for job in queue)),
        }

    def _add(self, **counts: float) -> None:
        for name, value in counts.items():
            self._counts[name] += value


@dataclass(slots=True)
class SignalReader:
    """Feeds ``scaler`` with what routers report.

    Attributes:
        seen: the counts that were last read of each router, by any name that is its own.
    """

    scaler: Scaler
    seen: dict[str, Mapping[str, float]]

    def read(self, now: float, routers: Mapping[str, Mapping[str, float]]) -> tuple[PoolState, PoolState]:
        """Takes in what is new since the last call; the prefill and decode pools as they are now."""
        for name, numbers in routers.items():
            before = self.seen.get(name)
            # A router that is new here may be old; its past is not load of now.
            if before is not None:
                self._feed(now, {key: numbers[key] - before[key] for key in COUNTS})
            self.seen[name] = {key: numbers[key] for key in COUNTS}
        for name in self.seen.keys() - routers.keys():
            del self.seen[name]
        return pool_states(routers.values())

    def _feed(self, now: float, new: Mapping[str, float]) -> None:
        for tokens in two_point_values(round(new["arrivals"]), new["arrived_tokens"], new["arrived_tokens_squared"]):
            self.scaler.arrived(now, tokens)
        if finished := round(new["finished"]):
            prompt, answer = (round(new[f"finished_{key}_tokens"] / finished) for key in ("prompt", "answer"))
            timed = new["timed"]
            itl, batch = ((new[f"timed_{key}"] / timed if timed else 0.0) for key in ("itl_seconds", "batch"))
            for _ in range(finished):
                self.scaler.finished(now, prompt, answer, itl, batch)
        if new["prefill_seconds"] > 0:
            self.scaler.prefilled(new["prefilled_tokens"], new["prefill_seconds"])


def pool_states(routers: Iterable[Mapping[str, float]]) -> tuple[PoolState, PoolState]:
    """The prefill and decode pools by what routers report. Workers that start are in no router's list."""
    reports = list(routers)

    def largest(key: str) -> int:
        return round(max((report[key] for report in reports), default=0))

    def total(key: str) -> int:
        return round(sum(report[key] for report in reports))

    def state(stage: str, jobs: int, tokens: int) -> PoolState:
        return PoolState(
            ready=largest(f"{stage}_ready"),
            draining=largest(f"{stage}_draining"),
            waiting_jobs=largest(f"{stage}_waiting_jobs") + jobs,
            waiting_tokens=largest(f"{stage}_waiting_tokens") + tokens,
            running=largest(f"{stage}_running"),
            kv_tokens=largest(f"{stage}_kv_tokens"),
        )

    return (
        state("prefill", total("queued_jobs"), total("queued_tokens")),
        state("decode", total("queued_for_decode"), 0),
    )


def two_point_values(count: int, total: float, squares: float) -> list[int]:
    """``count`` whole numbers, half of them low and half high, with about this total and sum of squares."""
    if count <= 0:
        return []
    mean = total / count
    deviation = math.sqrt(max(0.0, squares / count - mean * mean))
    low, high = max(1, round(mean - deviation)), max(1, round(mean + deviation))
    odd = [max(1, round(mean))] if count % 2 else []
    return [low] * (count // 2) + odd + [high] * (count // 2)


def _reported(pool: Pool, now: float) -> dict[str, float]:
    loads = [worker.report.load for worker in pool if worker.report is not None]
    return {
        "ready": float(sum(worker.alive(now) for worker in pool)),
        "draining": float(sum(worker.draining for worker in pool)),
        "waiting_jobs": float(sum(load.waiting for load in loads)),
        "waiting_tokens": float(sum(load.queued_tokens for load in loads)),
        "running": float(sum(load.running for load in loads)),
        "kv_tokens": float(max((load.kv_blocks_total * load.block_size for load in loads), default=0)),
    }


class _Occupancy:
    """How many requests ran on each worker over any recent time, from samples of what workers report."""

    _MEMORY = 600.0  # seconds

    def __init__(self) -> None:
        self._samples: dict[str, list[tuple[float, float]]] = {}  # (time, requests x seconds until then)
        self._running: dict[str, int] = {}

    def sample(self, roster: Roster, now: float) -> None:
        """Takes down what the workers last reported."""
        running = {
            worker.id: worker.report.load.running
            for pool in (roster.prefill, roster.decode)
            for worker in pool
            if worker.report is not None
        }
        for worker, count in running.items():
            samples = self._samples.setdefault(worker, [(now, 0.0)])
            at, total = samples[-1]
            if now > at:
                samples.append((now, total + (now - at) * self._running.get(worker, count)))
                if len(samples) > 1000 or samples[0][0] < now - self._MEMORY:
                    del samples[: len(samples) // 4]
        self._running = running
        for worker in self._samples.keys() - running.keys():
            del self._samples[worker]

    def mean(self, worker: str, since: float, until: float) -> float:
        """Requests on ``worker`` on average, one at least."""
        running = self._running.get(worker, 1)
        samples = self._samples.get(worker, [])
        since = max(since, samples[0][0]) if samples else until
        if until <= since:
            return float(max(1, running))
        # As it was at the last sample until now.
        at, total = samples[-1]
        known = [*samples, (until, total + running * (until - at))] if until > at else samples
        return max(1.0, (_at(known, until) - _at(known, since)) / (until - since))


def _at(samples: Sequence[tuple[float, float]], time: float) -> float:
    """The running total at ``time``, between samples in proportion."""
    index = bisect_left(samples, (time, -math.inf))
    if index == 0 or index == len(samples):
        return samples[min(index, len(samples) - 1)][1]
    (before, low), (after, high) = samples[index - 1], samples[index]
    return low + (high - low) * (time - before) / (after - before)

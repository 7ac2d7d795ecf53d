"""Scaling signals: the numbers that routers report to the scaling policy, and the reader that feeds a ``Scaler``.

Counts only grow, so a reader that misses some reports loses nothing; all other numbers are current values. Several
routers see the same workers but different requests. So counts and router queues add up, and workers' reports do not.

Names of numbers are flat. With several tiers, a number that concerns a decode pool is there for each tier as well, with
the tier after a dot: ``arrivals.fast`` beside ``arrivals``, which is the sum.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

from overfill.routing.dispatcher import Dispatcher
from overfill.routing.job import Job, JobState
from overfill.routing.pool import Pool, Roster
from overfill.routing.scaling import PoolState, Scaler
from overfill.routing.worker import DECODE, PREFILL, Worker
from overfill.v1 import common_pb2, inference_pb2

_FADE = 0.98  # weight of the previous prefix-cache hit rate when an answer finishes

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
"""Names of the counts, all since the router started.

``arrived_tokens`` are prompt tokens to compute, by the recent hit rate of the prefix cache. ``timed`` counts finished
answers with a known ITL (mean gap between tokens) and batch (sequences running on the same worker).
"""


class Signals:
    """The signals of one router."""

    def __init__(self, roster: Roster, dispatcher: Dispatcher) -> None:
        self._roster = roster
        self._dispatcher = dispatcher
        self._counts = {tier: dict.fromkeys(COUNTS, 0.0) for tier in roster.tiers}
        self._occupancy = _Occupancy()
        self._hit_rate = 0.0  # prefix-cache hit rate of finished prompts, in tokens

    def arrived(self, tier: str, prompt_tokens: int) -> None:
        """Counts a queued request of ``tier``."""
        tokens = max(1.0, prompt_tokens * (1 - self._hit_rate))
        self._add(tier, arrivals=1, arrived_tokens=tokens, arrived_tokens_squared=tokens * tokens)

    def finished(self, answer: inference_pb2.Finished, tier: str, now: float, decode_base: int = 1) -> None:
        """Counts a complete answer.

        Args:
            tier: tier whose decode worker wrote its end.
            now: seconds, monotonic, in every method.
            decode_base: ``AnswerState.decode_base``.
        """
        usage, timing = answer.usage, answer.timing
        self._add(
            tier,
            finished=1,
            finished_prompt_tokens=usage.prompt_tokens,
            finished_answer_tokens=usage.completion_tokens,
        )
        decoded = usage.completion_tokens - decode_base
        if decoded > 0 and timing.decode_ns:
            seconds = timing.decode_ns / 1e9
            # Average over the whole decode time: at its end, the sequences beside it may all have left already.
            concurrent = self._occupancy.mean(DECODE, answer.decode_worker, now - seconds, now)
            self._add(tier, timed=1, timed_itl_seconds=seconds / decoded, timed_batch=concurrent)
        computed = usage.prompt_tokens - usage.cached_tokens
        if computed > 0 and timing.prefill_compute_ns:
            # Divide the seconds by the number of prompts that shared the worker's steps.
            began = now - (timing.decode_ns + timing.prefill_compute_ns) / 1e9
            seconds = timing.prefill_compute_ns / 1e9
            concurrent = self._occupancy.mean(PREFILL, answer.prefill_worker, began, began + seconds)
            self._add(tier, prefilled_tokens=computed, prefill_seconds=seconds / concurrent)
        if usage.prompt_tokens:
            self._hit_rate = _FADE * self._hit_rate + (1 - _FADE) * usage.cached_tokens / usage.prompt_tokens

    def read(self, now: float) -> dict[str, float]:
        """Returns all signals: ``COUNTS``, ``<stage>_<field of PoolState>`` from workers' reports, and the queue.

        Call it about once a second, because it samples the number of requests running on the workers.
        """
        self._occupancy.sample(self._roster, now)
        numbers = {name: sum(counts[name] for counts in self._counts.values()) for name in COUNTS}
        queue = self._waiting_for_prefill()
        numbers |= _named("prefill", _reported(self._roster.prefill, now))
        numbers |= _named("decode", _reported([w for pool in self._roster.decode.values() for w in pool], now))
        numbers |= {
            "queued_jobs": float(len(queue)),
            "queued_for_decode": float(sum(map(self._dispatcher.queued, self._roster.decode.values()))),
            "queued_tokens": float(sum(job.prompt_tokens for job in queue)),
        }
        if len(self._counts) > 1:
            for tier, pool in self._roster.decode.items():
                of_tier = self._counts[tier] | _named("decode", _reported(pool, now))
                of_tier["queued_for_decode"] = float(self._dispatcher.queued(pool))
                numbers |= {f"{name}.{tier}": value for name, value in of_tier.items()}
        return numbers

    def own_pools(self, now: float) -> tuple[PoolState, dict[str, PoolState]]:
        """Returns the prefill pool and each tier's decode pool, with only this router's requests.

        Unlike the workers' reports, which count every router's requests, these numbers add up over routers.
        """
        queue = self._waiting_for_prefill()
        prefill = self._roster.prefill
        states = {pool: _own_requests(pool, now) for pool in self._roster.pools()}
        states[prefill] = replace(
            states[prefill],
            waiting_jobs=len(queue),
            waiting_tokens=states[prefill].waiting_tokens + sum(job.prompt_tokens for job in queue),
        )
        decode = {
            tier: replace(states[pool], waiting_jobs=self._dispatcher.queued(pool), waiting_tokens=0)
            for tier, pool in self._roster.decode.items()
        }
        return states[prefill], decode

    def _waiting_for_prefill(self) -> list[Job]:
        """Returns the jobs that wait for a prefill slot: all jobs if none is free."""
        everything_waits = not self._dispatcher.prefill_is_free()
        return [job for job in self._dispatcher.waiting() if everything_waits or job.state is JobState.WANTS_PREFILL]

    def _add(self, tier: str, **counts: float) -> None:
        for name, value in counts.items():
            self._counts[tier][name] += value


@dataclass(slots=True)
class SignalReader:
    """Feeds ``scaler`` with the signals of all routers.

    Attributes:
        seen: the latest counts of each router, by a unique name of the router.
    """

    scaler: Scaler
    seen: dict[str, Mapping[str, float]]

    def read(self, now: float, routers: Mapping[str, Mapping[str, float]]) -> tuple[PoolState, Mapping[str, PoolState]]:
        """Feeds the growth since the last call to the scaler; returns the prefill pool and each tier's decode pool."""
        for name, numbers in routers.items():
            before = self.seen.get(name)
            # Skip the first reading of a router: its counts may hold hours of past load.
            if before is not None:
                self._feed(now, {key: value - before.get(key, 0.0) for key, value in numbers.items()})
            self.seen[name] = numbers
        for name in self.seen.keys() - routers.keys():
            del self.seen[name]
        return pool_states(routers.values(), self.scaler.tiers)

    def _feed(self, now: float, new: Mapping[str, float]) -> None:
        for tier in self.scaler.tiers:
            self._feed_tier(tier, now, {name: _of_tier(name, tier, new, self.scaler.tiers) for name in COUNTS})
        if new["prefill_seconds"] > 0:
            self.scaler.prefilled(new["prefilled_tokens"], new["prefill_seconds"])

    def _feed_tier(self, tier: str, now: float, new: Mapping[str, float]) -> None:
        for tokens in two_point_values(round(new["arrivals"]), new["arrived_tokens"], new["arrived_tokens_squared"]):
            self.scaler.arrived(tier, now, tokens)
        if finished := round(new["finished"]):
            prompt, answer = (round(new[f"finished_{key}_tokens"] / finished) for key in ("prompt", "answer"))
            timed = new["timed"]
            itl, batch = ((new[f"timed_{key}"] / timed if timed else 0.0) for key in ("itl_seconds", "batch"))
            for _ in range(finished):
                self.scaler.finished(tier, now, prompt, answer, itl, batch)


def pool_states(routers: Iterable[Mapping[str, float]], tiers: Iterable[str]) -> tuple[PoolState, dict[str, PoolState]]:
    """Returns the prefill pool and each tier's decode pool as routers report them.

    Workers that have not joined yet are not among them.
    """
    reports, tiers = list(routers), tuple(tiers)

    def total(key: str, tier: str = "") -> int:
        return round(sum(_of_tier(key, tier, report, tiers) for report in reports))

    def state(stage: str, jobs: int, tokens: int, tier: str = "") -> PoolState:
        def largest(key: str) -> int:
            return round(max((_of_tier(f"{stage}_{key}", tier, report, tiers) for report in reports), default=0))

        return PoolState(
            ready=largest("ready"),
            draining=largest("draining"),
            waiting_jobs=largest("waiting_jobs") + jobs,
            waiting_tokens=largest("waiting_tokens") + tokens,
            running=largest("running"),
            colocated=largest("colocated"),
            kv_tokens=largest("kv_tokens"),
            max_num_seqs=largest("max_num_seqs"),
        )

    return (
        state("prefill", total("queued_jobs"), total("queued_tokens")),
        {tier: state("decode", total("queued_for_decode", tier), 0, tier) for tier in tiers},
    )


def _of_tier(name: str, tier: str, numbers: Mapping[str, float], tiers: Iterable[str]) -> float:
    """Returns a tier's number, or the total for the tier "".

    A router with one tier reports totals only. They are those of the first of ``tiers``.
    """
    if (key := f"{name}.{tier}") in numbers:
        return numbers[key]
    return numbers.get(name, 0.0) if tier in ("", next(iter(tiers))) else 0.0


def _named(stage: str, numbers: Mapping[str, float]) -> dict[str, float]:
    return {f"{stage}_{name}": value for name, value in numbers.items()}


def two_point_values(count: int, total: float, squares: float) -> list[int]:
    """Returns ``count`` integers with about this total and sum of squares: half of them low, half high."""
    if count <= 0:
        return []
    mean = total / count
    deviation = math.sqrt(max(0.0, squares / count - mean * mean))
    low, high = max(1, round(mean - deviation)), max(1, round(mean + deviation))
    odd = [max(1, round(mean))] if count % 2 else []
    return [low] * (count // 2) + odd + [high] * (count // 2)


def _reported(workers: Iterable[Worker], now: float) -> dict[str, float]:
    workers = list(workers)
    loads = [worker.report.load for worker in workers if worker.report is not None]
    # Workers differ while a setting is rolled out; the number that the pool runs at once follows the mean.
    limits = [worker.info.max_num_seqs for worker in workers if worker.info.max_num_seqs]
    return {
        "ready": float(sum(worker.alive(now) for worker in workers)),
        "colocated": float(sum(worker.alive(now) and worker.info.colocated for worker in workers)),
        "draining": float(sum(worker.draining for worker in workers)),
        "waiting_jobs": float(sum(load.waiting for load in loads)),
        "waiting_tokens": float(sum(load.queued_tokens for load in loads)),
        "running": float(sum(load.running for load in loads)),
        "kv_tokens": float(max((load.kv_blocks_total * load.block_size for load in loads), default=0)),
        "max_num_seqs": fmean(limits) if limits else 0.0,
    }


def _own_requests(pool: Pool, now: float) -> PoolState:
    """Returns the state of ``pool`` without its router's queue, and without other routers' requests on its workers."""
    reported = _reported(pool, now)
    tokens, routers = 0.0, max((worker.report.routers for worker in pool if worker.report is not None), default=1)
    for worker in pool:
        if worker.report is not None and (tokens_there := worker.report.load.queued_tokens):
            # The router does not know how much of its prompts is computed: assume its share of the worker's requests.
            load = worker.report.load
            tokens += tokens_there * min(1.0, worker.in_flight / max(1, load.running + load.waiting))
    return PoolState(
        ready=round(reported["ready"]),
        draining=round(reported["draining"]),
        waiting_tokens=round(tokens),
        running=sum(worker.in_flight for worker in pool),
        colocated=reported["colocated"] / max(1, routers),  # this router's share
        kv_tokens=round(reported["kv_tokens"]),
        max_num_seqs=round(reported["max_num_seqs"]),
    )


_Seat = tuple[common_pb2.Stage, str]  # stage and id of a worker


class _Occupancy:
    """Mean number of requests on a stage of a worker over any recent interval, from samples of the workers' reports."""

    _MEMORY = 600.0  # seconds

    def __init__(self) -> None:
        self._samples: dict[_Seat, list[tuple[float, float]]] = {}  # (time, requests x seconds until then)
        self._running: dict[_Seat, int] = {}

    def sample(self, roster: Roster, now: float) -> None:
        """Samples the latest reports of all workers."""
        running = {(w.info.stage, w.id): w.report.load.running for w in roster.workers() if w.report is not None}
        for seat, count in running.items():
            samples = self._samples.setdefault(seat, [(now, 0.0)])
            at, total = samples[-1]
            if now > at:
                samples.append((now, total + (now - at) * self._running.get(seat, count)))
                if len(samples) > 1000 or samples[0][0] < now - self._MEMORY:
                    del samples[: len(samples) // 4]
        self._running = running
        for seat in self._samples.keys() - running.keys():
            del self._samples[seat]

    def mean(self, stage: common_pb2.Stage, worker: str, since: float, until: float) -> float:
        """Returns the mean number of requests on a stage of ``worker`` between two times; at least 1."""
        running = self._running.get((stage, worker), 1)
        samples = self._samples.get((stage, worker), [])
        since = max(since, samples[0][0]) if samples else until
        if until <= since:
            return float(max(1, running))
        return max(1.0, (_at(samples, until, running) - _at(samples, since, running)) / (until - since))


def _at(samples: Sequence[tuple[float, float]], time: float, running: int) -> float:
    """Returns the running total at ``time``, interpolated linearly between samples.

    Since the last sample, it assumes ``running``, the number reported there.
    """
    index = bisect_left(samples, (time, -math.inf))
    if index == 0:
        return samples[0][1]
    if index == len(samples):
        at, total = samples[-1]
        return total + running * (time - at)
    (before, low), (after, high) = samples[index - 1], samples[index]
    return low + (high - low) * (time - before) / (after - before)

"""What a decision of the router's dispatcher costs, by the number of workers (``overfill bench route``). No sockets.

Every request lives as in a busy router: submitted, placed on a decode worker, reserved, given a prefill slot, first
token, finished; workers report ten times a second. Virtual arrivals; the time is the CPU time of the dispatcher's calls
alone.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from overfill.kv.handshake import KvIdentity
from overfill.kv.keys import PromptKeys
from overfill.kv.spec import KvSpec, RopeSpec
from overfill.routing.dispatcher import Dispatcher, Job, Placement
from overfill.routing.policies import POLICIES, PolicyName
from overfill.routing.pool import Roster
from overfill.routing.worker import DECODE, PREFILL, WorkerInfo
from overfill.v1 import decode_pb2, registry_pb2

BLOCK = 16
PROMPT_BLOCKS = 32
REPORTS = 10
"""Of each worker, per second."""

FAMILIES = 50
"""Prompts that begin alike: as many, half of each prompt its family's."""


@dataclass(frozen=True, slots=True)
class RouteCost:
    """Microseconds.

    Attributes:
        workers: of each stage.
        decision_us, decision_p99_us: one call that may place something, with what follows from it.
        request_us: all calls of one request.
        report_us: taking one report.
        waiting: requests in the queue at the end.
    """

    prefill_policy: str
    decode_policy: str
    workers: int
    requests: int
    decision_us: float
    decision_p99_us: float
    request_us: float
    report_us: float
    waiting: int


class _Bench:
    def __init__(self, workers: int, prefill: PolicyName, decode: PolicyName) -> None:
        self.roster = Roster()
        self.dispatcher = Dispatcher(
            self.roster, POLICIES[decode](1), prefill_policy=POLICIES[prefill](1), max_queue=1 << 20
        )
        self.decisions: list[int] = []
        self.reports: list[int] = []
        identity = KvIdentity(1, "a", "b", KvSpec(1, 1, 2, "float32", RopeSpec()))
        self.workers = [
            self.roster.join(WorkerInfo(f"{name}{i}", 1, stage, "h:1", "h:2", identity, 0, 9))
            for i in range(workers)
            for name, stage in (("p", PREFILL), ("d", DECODE))
        ]
        for worker in self.workers:
            self.report(worker.id, 0.0)

    def report(self, worker_id: str, now: float) -> None:
        worker = self.roster.find(worker_id)
        assert worker is not None
        used = worker.in_flight * (PROMPT_BLOCKS + 4)
        load = decode_pb2.WorkerLoad(
            kv_blocks_total=8192, kv_blocks_used=used, block_size=BLOCK, running=worker.in_flight
        )
        report = registry_pb2.Report(load=load, credits=64, ready=True)
        start = time.thread_time_ns()
        self.dispatcher.report(worker, report, now)
        self.reports.append(time.thread_time_ns() - start)

    def poll(self, now: float) -> list[Placement]:
        start = time.thread_time_ns()
        outcomes = self.dispatcher.poll(now)
        self.decisions.append(time.thread_time_ns() - start)
        return [outcome for outcome in outcomes if isinstance(outcome, Placement)]

    def run(self, requests: int, rate: float, keys: Sequence[PromptKeys | None]) -> None:
        """Requests come ``rate`` a second and stay for two seconds, or as long as keeps the pool two thirds full."""
        stay = min(2.0, 0.66 * 64 * len(self.workers) / 2 / rate)
        running: deque[tuple[float, Job]] = deque()
        reporting, now = 0.0, 0.0
        for index in range(requests):
            now += 1 / rate
            reporting += REPORTS * len(self.workers) / rate
            while reporting >= 1:
                reporting -= 1
                self.workers.append(worker := self.workers.pop(0))
                self.report(worker.id, now)
            while running and running[0][0] <= now:
                self.dispatcher.finish(running.popleft()[1])
                self._place(self.poll(now), running, now, stay)
            prompt = PROMPT_BLOCKS * BLOCK
            job = Job(str(index), prompt, 128, block_keys=keys[index])
            self.dispatcher.submit(job, now)
            self._place(self.poll(now), running, now, stay)

    def _place(self, placed: list[Placement], running: deque[tuple[float, Job]], now: float, stay: float) -> None:
        while placed:
            job = placed.pop().job
            if job.prefill is None:
                self.dispatcher.reserved(job)
            else:
                self.dispatcher.prefill_done(job, now)
                running.append((now + stay, job))
            placed += self.poll(now)


def measure(
    workers: int, requests: int, rate: float, prefill: PolicyName, decode: PolicyName, seed: int = 0
) -> RouteCost:
    """One row: ``workers`` of each stage under ``rate`` requests per second of virtual time."""
    draw = np.random.default_rng(seed)
    half = PROMPT_BLOCKS // 2 * BLOCK
    families = draw.integers(0, 50_000, (FAMILIES, half)).tolist()
    rests = draw.integers(0, 50_000, (requests, half)).tolist()
    keys = [PromptKeys(1, families[int(draw.integers(FAMILIES))] + rest) for rest in rests]
    bench = _Bench(workers, prefill, decode)
    bench.reports.clear()
    bench.run(requests, rate, keys)
    decisions = np.array(bench.decisions) / 1e3
    return RouteCost(
        prefill,
        decode,
        workers,
        requests,
        float(np.mean(decisions)),
        float(np.percentile(decisions, 99)),
        float(decisions.sum() / requests),
        float(np.mean(bench.reports)) / 1e3,
        bench.dispatcher.num_waiting,
    )

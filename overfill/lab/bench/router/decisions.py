"""Measures the time of the dispatcher's decisions, by number of workers (``overfill bench router --decisions``).

No sockets. Every request goes through the states that it has in a busy router: submitted, placed on a decode worker,
reserved, placed on a prefill worker, first token, finished. Every worker reports ten times a second. Time is virtual;
only the CPU time of the dispatcher's calls is measured.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence

import numpy as np

from overfill.kv.handshake import KvIdentity
from overfill.kv.keys import PromptKeys
from overfill.kv.spec import KvSpec, RopeSpec
from overfill.lab.bench.measurement import Measurement
from overfill.routing.dispatcher import Dispatcher, Job, Placement
from overfill.routing.policies import DECODE_DEFAULT, POLICIES, PREFILL_DEFAULT
from overfill.routing.pool import Roster
from overfill.routing.worker import DECODE, PREFILL, WorkerInfo
from overfill.v1 import common_pb2, decode_pb2, registry_pb2

BLOCK_SIZE = 16
PROMPT_BLOCKS = 32
PROMPT = range(PROMPT_BLOCKS * BLOCK_SIZE)
SAMPLING = common_pb2.SamplingParams(max_tokens=128)
CREDITS = 64
"""Concurrent requests of a worker."""

REPORTS_PER_SECOND = 10
REQUESTS = 20_000
REQUEST_RATE = 10_000.0
"""Requests per second of virtual time."""

PREFIX_FAMILIES = 50
"""Number of prompt families. The first half of a prompt is the same for all prompts of its family."""


class _VirtualRouter:
    """A dispatcher with ``workers`` workers of each stage, driven in virtual time.

    Attributes:
        decisions: CPU nanoseconds of each ``poll``, which may place requests.
        reports: CPU nanoseconds of each worker's report.
    """

    def __init__(self, workers: int) -> None:
        self.roster = Roster()
        self.roster.use(POLICIES[PREFILL_DEFAULT](1), lambda: POLICIES[DECODE_DEFAULT](1))
        self.dispatcher = Dispatcher(self.roster, max_queue=1 << 20)
        self.decisions: list[int] = []
        self.reports: list[int] = []
        identity = KvIdentity(1, "a", "b", KvSpec(1, 1, 2, "float32", RopeSpec()))
        self.workers = [
            self.roster.join(WorkerInfo(f"{name}{i}", 1, stage, "h:1", (), identity, 0, 9))
            for i in range(workers)
            for name, stage in (("p", PREFILL), ("d", DECODE))
        ]
        for worker in self.workers:
            self.report(worker.id, 0.0)
        self.reports.clear()

    def report(self, worker_id: str, now: float) -> None:
        """Gives the dispatcher a report of one worker."""
        worker = self.roster.find(worker_id)
        assert worker is not None
        used = worker.in_flight * (PROMPT_BLOCKS + 4)
        load = decode_pb2.WorkerLoad(
            kv_blocks_total=8192, kv_blocks_used=used, block_size=BLOCK_SIZE, running=worker.in_flight
        )
        report = registry_pb2.Report(load=load, credits=CREDITS, ready=True)
        start = time.thread_time_ns()
        self.dispatcher.report(worker, report, now)
        self.reports.append(time.thread_time_ns() - start)

    def poll(self, now: float) -> list[Placement]:
        """Lets the dispatcher place requests."""
        start = time.thread_time_ns()
        outcomes = self.dispatcher.poll(now)
        self.decisions.append(time.thread_time_ns() - start)
        return [outcome for outcome in outcomes if isinstance(outcome, Placement)]

    def run(self, keys: Sequence[PromptKeys | None]) -> None:
        """Submits a request per entry of ``keys``, at ``REQUEST_RATE``.

        A request runs for two seconds, or for less where that would fill more than two thirds of the credits.
        """
        duration = min(2.0, 0.66 * CREDITS * len(self.workers) / 2 / REQUEST_RATE)
        running: deque[tuple[float, Job]] = deque()
        reports_due, now = 0.0, 0.0
        for index, key in enumerate(keys):
            now += 1 / REQUEST_RATE
            reports_due += REPORTS_PER_SECOND * len(self.workers) / REQUEST_RATE
            while reports_due >= 1:
                reports_due -= 1
                self.workers.append(worker := self.workers.pop(0))
                self.report(worker.id, now)
            while running and running[0][0] <= now:
                self.dispatcher.finish(running.popleft()[1])
                self._advance(self.poll(now), running, now, duration)
            start = decode_pb2.StartDecode(request_id=str(index), sampling=SAMPLING)
            self.dispatcher.submit(Job(start=start, prompt_token_ids=PROMPT, block_keys=key), now)
            self._advance(self.poll(now), running, now, duration)

    def _advance(
        self, placements: list[Placement], running: deque[tuple[float, Job]], now: float, duration: float
    ) -> None:
        """Answers placements as workers do, until the dispatcher makes no more."""
        while placements:
            job = placements.pop().job
            if job.prefill is None:
                self.dispatcher.reserved(job)
            else:
                self.dispatcher.prefill_done(job, now)
                running.append((now + duration, job))
            placements += self.poll(now)


def measure_decisions(counts: Sequence[int], requests: int = REQUESTS) -> list[Measurement]:
    """Measures ``requests`` requests for each number of workers per stage.

    The peer of a figure is the same figure with the first number of workers. The goal is that both are equal.
    """
    first, *others = counts
    beside = _microseconds(first, requests)
    measurements = [Measurement(f"{name}_{first}_workers", value, "us") for name, value in beside.items()]
    for count in others:
        for name, value in _microseconds(count, requests).items():
            peer = f"{first} workers"
            measurements.append(Measurement(f"{name}_{count}_workers", value, "us", peer=peer, peer_value=beside[name]))
    return measurements


def _microseconds(workers: int, requests: int) -> dict[str, float]:
    """CPU microseconds per decision (mean and p99), per request and per report."""
    router = _VirtualRouter(workers)
    router.run(_prompt_keys(requests))
    decisions = np.array(router.decisions) / 1e3
    return {
        "decision_mean": float(decisions.mean()),
        "decision_p99": float(np.percentile(decisions, 99)),
        "request": float(decisions.sum() / requests),
        "report": float(np.mean(router.reports)) / 1e3,
    }


def _prompt_keys(requests: int) -> list[PromptKeys]:
    draw = np.random.default_rng(0)
    half = PROMPT_BLOCKS // 2 * BLOCK_SIZE
    families = draw.integers(0, 50_000, (PREFIX_FAMILIES, half)).tolist()
    rests = draw.integers(0, 50_000, (requests, half)).tolist()
    return [PromptKeys(1, families[int(draw.integers(PREFIX_FAMILIES))] + rest) for rest in rests]

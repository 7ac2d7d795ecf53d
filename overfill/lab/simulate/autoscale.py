"""Runs the router's scaling policy in the simulation: feeds it signals and applies its targets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from overfill.lab.simulate.clock import Clock
from overfill.lab.simulate.profiles import Profile
from overfill.lab.simulate.request import Counters, SimRequest
from overfill.lab.simulate.workers import DecodeWorker, PrefillWorker, SimWorker
from overfill.routing.dispatcher import Job, JobState
from overfill.routing.scaling import PoolState, Scaler, ScalingConfig, Targets
from overfill.routing.worker import DECODE, PREFILL
from overfill.v1 import common_pb2

INTERVAL = 1.0
"""Seconds between decisions."""


class Fleet(Protocol):
    """The simulated workers and requests, as the autoscaler sees and changes them.

    Attributes:
        open: Job -> request that has not ended.
        workers: Name -> worker, including those that are starting or draining.
    """

    @property
    def clock(self) -> Clock: ...

    @property
    def counters(self) -> Counters: ...

    @property
    def profile(self) -> Profile: ...

    @property
    def open(self) -> Mapping[Job, SimRequest]: ...

    @property
    def workers(self) -> Mapping[str, SimWorker]: ...

    def start_worker(self, stage: common_pb2.Stage, delay: float) -> SimWorker: ...

    def drain_worker(self, worker: SimWorker) -> None: ...


class Autoscaler:
    """Scales the fleet from what a router knows: arrivals, answers, reports, and prefill workers' busy time.

    Attributes:
        latest: The last decision; None before the first.
    """

    def __init__(self, fleet: Fleet, config: ScalingConfig) -> None:
        self._fleet = fleet
        self._config = config
        self._scaler = Scaler(config)
        self._worked: dict[str, tuple[int, float]] = {}  # prefill worker -> (tokens, busy seconds) at the last tick
        self.latest: Targets | None = None

    def arrived(self, request: SimRequest) -> None:
        counters = self._fleet.counters
        # Estimate the new prompt's cached tokens by the pool's hit rate so far.
        share = counters.cached_tokens / counters.prompt_tokens if counters.prompt_tokens else 0.0
        tokens = request.trace.prompt_tokens
        self._scaler.arrived(self._fleet.clock.now, tokens, int(share * tokens))

    def finished(self, request: SimRequest) -> None:
        worker = request.job.decode
        running = worker.report.load.running if worker is not None and worker.report is not None else 0
        trace = request.trace
        self._scaler.finished(self._fleet.clock.now, trace.prompt_tokens, trace.output_tokens, request.itl, running)

    def tick(self) -> None:
        fleet = self._fleet
        prefill = [w for w in fleet.workers.values() if isinstance(w, PrefillWorker)]
        decode = [w for w in fleet.workers.values() if isinstance(w, DecodeWorker)]
        for worker in prefill:
            engine = worker.engine
            tokens, seconds = self._worked.get(worker.name, (0, 0.0))
            self._worked[worker.name] = engine.computed, engine.busy
            self._scaler.prefilled(engine.computed - tokens, engine.busy - seconds)
        self.latest = self._scaler.targets(fleet.clock.now, *self._states(prefill, decode))
        self._apply(PREFILL, list(prefill), self.latest.prefill)
        self._apply(DECODE, list(decode), self.latest.decode)
        fleet.clock.after(INTERVAL, self.tick)

    def _states(self, prefill: list[PrefillWorker], decode: list[DecodeWorker]) -> tuple[PoolState, PoolState]:
        fleet = self._fleet
        jobs = [request.job for request in fleet.open.values()]
        waiting = [job for job in jobs if job.state is JobState.WAITING]
        ahead = [job for job in jobs if job.state in (JobState.PLACED, JobState.WANTS_PREFILL)]
        tokens = sum(job.prompt_tokens for job in ahead) + sum(w.engine.queued_tokens for w in prefill)
        model = fleet.profile.decode
        return (
            PoolState(
                **_counts(prefill),
                waiting_jobs=len(ahead) + sum(w.engine.num_waiting for w in prefill),
                waiting_tokens=tokens,
                running=sum(w.engine.num_admitted for w in prefill),
            ),
            PoolState(
                **_counts(decode),
                waiting_jobs=len(waiting),
                waiting_tokens=sum(job.prompt_tokens for job in waiting),
                running=sum(w.engine.num_running for w in decode),
                kv_tokens=model.kv_tokens,
            ),
        )

    def _apply(self, stage: common_pb2.Stage, pool: list[SimWorker], target: int) -> None:
        fleet = self._fleet
        staying = [worker for worker in pool if not worker.draining]
        for _ in range(target - len(staying)):
            limit = self._config.max_total
            # A draining worker occupies its machine until it has left.
            if limit is not None and len(fleet.workers) >= limit:
                return
            fleet.start_worker(stage, fleet.profile.startup)
        surplus = len(staying) - target
        if surplus > 0:
            staying.sort(key=lambda w: (w.ready_since is not None, w.active, -w.since))
            for worker in staying[:surplus]:
                fleet.drain_worker(worker)


def _counts(pool: Sequence[SimWorker]) -> dict[str, int]:
    return {
        "ready": sum(w.ready_since is not None and not w.draining for w in pool),
        "starting": sum(w.ready_since is None for w in pool),
        "draining": sum(w.draining for w in pool),
    }

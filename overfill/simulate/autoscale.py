"""The scaling policy at work in the simulation: what it is told, and how its targets become workers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from overfill.routing.dispatcher import JobState
from overfill.routing.pool import DECODE, PREFILL
from overfill.routing.scaling import PoolState, Scaler, ScalingConfig, Targets
from overfill.simulate.request import SimRequest
from overfill.simulate.workers import DecodeWorker, PrefillWorker, SimWorker
from overfill.v1 import common_pb2

if TYPE_CHECKING:
    from overfill.simulate.stack import Simulation

INTERVAL = 1.0
"""Seconds between decisions."""


class Autoscaler:
    """Uses only what a router knows: arrivals, answers, reports, and the time that prefill workers were busy.

    Attributes:
        latest: the last decision.
    """

    def __init__(self, simulation: Simulation, config: ScalingConfig) -> None:
        self._simulation = simulation
        self._config = config
        self._scaler = Scaler(config)
        self._worked: dict[str, tuple[int, float]] = {}  # tokens and seconds of each prefill worker, last time
        self.latest: Targets | None = None

    def arrived(self, request: SimRequest) -> None:
        counters = self._simulation.counters
        # What the pool has found in its caches so far is the best guess for one more prompt.
        share = counters.cached_tokens / counters.prompt_tokens if counters.prompt_tokens else 0.0
        tokens = request.trace.prompt_tokens
        self._scaler.arrived(self._simulation.clock.now, tokens, int(share * tokens))

    def finished(self, request: SimRequest) -> None:
        worker = request.job.decode
        running = worker.report.load.running if worker is not None and worker.report is not None else 0
        trace = request.trace
        self._scaler.finished(
            self._simulation.clock.now, trace.prompt_tokens, trace.output_tokens, request.itl, running
        )

    def tick(self) -> None:
        simulation = self._simulation
        prefill = [w for w in simulation.workers.values() if isinstance(w, PrefillWorker)]
        decode = [w for w in simulation.workers.values() if isinstance(w, DecodeWorker)]
        for worker in prefill:
            engine = worker.engine
            tokens, seconds = self._worked.get(worker.name, (0, 0.0))
            self._worked[worker.name] = engine.computed, engine.busy
            self._scaler.prefilled(engine.computed - tokens, engine.busy - seconds)
        self.latest = self._scaler.targets(simulation.clock.now, *self._states(prefill, decode))
        self._apply(PREFILL, list(prefill), self.latest.prefill)
        self._apply(DECODE, list(decode), self.latest.decode)
        simulation.clock.after(INTERVAL, self.tick)

    def _states(self, prefill: list[PrefillWorker], decode: list[DecodeWorker]) -> tuple[PoolState, PoolState]:
        simulation = self._simulation
        jobs = [request.job for request in simulation.open.values()]
        waiting = [job for job in jobs if job.state is JobState.WAITING]
        ahead = [job for job in jobs if job.state in (JobState.PLACED, JobState.WANTS_PREFILL)]
        tokens = sum(job.prompt_tokens for job in ahead) + sum(w.engine.queued_tokens for w in prefill)
        model = simulation.profile.decode
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
        simulation = self._simulation
        staying = [worker for worker in pool if not worker.draining]
        for _ in range(target - len(staying)):
            limit = self._config.max_total
            # A draining worker keeps its machine until it has gone.
            if limit is not None and len(simulation.workers) >= limit:
                return
            simulation.start_worker(stage, simulation.profile.startup)
        surplus = len(staying) - target
        if surplus > 0:
            staying.sort(key=lambda w: (w.ready_since is not None, w.active, -w.since))
            for worker in staying[:surplus]:
                simulation.drain_worker(worker)


def _counts(pool: Sequence[SimWorker]) -> dict[str, int]:
    return {
        "ready": sum(w.ready_since is not None and not w.draining for w in pool),
        "starting": sum(w.ready_since is None for w in pool),
        "draining": sum(w.draining for w in pool),
    }

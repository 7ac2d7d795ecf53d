"""Runs the router's scaling policy in the simulation: feeds it signals and applies its targets.

A run with brownouts feeds the policy too, because its step costs predict the time between tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from overfill.lab.simulate.clock import Clock
from overfill.lab.simulate.options import SimTier
from overfill.lab.simulate.profiles import Profile
from overfill.lab.simulate.request import SimRequest
from overfill.lab.simulate.result import Counters
from overfill.lab.simulate.workers import DECODE_ONLY, PREFILL_ONLY, SimWorker, Stages
from overfill.routing.job import Job, JobState
from overfill.routing.scaling import INTERVAL, PoolState, Scaler, ScalingConfig, Targets


class Fleet(Protocol):
    """The simulated workers and requests, as the autoscaler sees and changes them.

    Attributes:
        open: Job -> request that has not ended.
        workers: Name -> worker, including those that are starting or draining.
    """

    clock: Clock
    counters: Counters
    profile: Profile
    tiers: dict[str, SimTier]
    open: dict[Job, SimRequest]
    workers: dict[str, SimWorker]

    def start_worker(self, stages: Stages, delay: float, tier: str = "") -> SimWorker:
        """Starts a worker, which is ready after ``delay``. ``tier`` is that of its answers."""

    def drain_worker(self, worker: SimWorker) -> None: ...


class LoadObserver:
    """Feeds a scaling policy with what a router knows: arrivals, answers, and prefill workers' busy time.

    Attributes:
        scaler: The policy.
    """

    def __init__(self, fleet: Fleet, scaler: Scaler) -> None:
        self._fleet = fleet
        self.scaler = scaler
        self._worked: dict[str, tuple[int, float]] = {}  # prefill worker -> (tokens, busy seconds) at the last look

    def arrived(self, request: SimRequest) -> None:
        counters = self._fleet.counters
        # Estimate the new prompt's cached tokens by the pool's hit rate so far.
        share = counters.cached_tokens / counters.prompt_tokens if counters.prompt_tokens else 0.0
        tokens = request.trace.prompt_tokens
        self.scaler.arrived(request.asked, self._fleet.clock.now, tokens, int(share * tokens))

    def finished(self, request: SimRequest) -> None:
        job, trace = request.job, request.trace
        worker = job.decode
        running = worker.report.load.running if worker is not None and worker.report is not None else 0
        self.scaler.finished(
            job.tier, self._fleet.clock.now, trace.prompt_tokens, trace.output_tokens, request.outcome.itl, running
        )

    def look(self) -> None:
        """Notes what the prefill workers have computed since the last call."""
        for worker in self._fleet.workers.values():
            if (engine := worker.prefill) is not None:
                tokens, seconds = self._worked.get(worker.name, (0, 0.0))
                self._worked[worker.name] = engine.computed, engine.busy
                self.scaler.prefilled(engine.computed - tokens, engine.busy - seconds)

    def short_prompts(self) -> dict[str, float]:
        """Returns the length of a short prompt for each tier, as ``ScalingAdvisor`` does."""
        found = {}
        for tier in self._fleet.tiers:
            pool = [w.decode for w in self._fleet.workers.values() if w.decode is not None and w.tier == tier]
            batch = sum(engine.batch for engine in pool) / max(1, len(pool))
            found[tier] = self.scaler.short_prompt(tier, batch)
        return found


class Autoscaler:
    """Starts and drains workers as the scaling policy recommends.

    Attributes:
        latest: The last decision; None before the first.
    """

    def __init__(self, fleet: Fleet, config: ScalingConfig, observer: LoadObserver) -> None:
        self._fleet = fleet
        self._config = config
        self._observer = observer
        self.latest: Targets | None = None

    def tick(self) -> None:
        fleet = self._fleet
        prefill = [w for w in fleet.workers.values() if w.stages == PREFILL_ONLY]
        decode: dict[str, list[SimWorker]] = {tier: [] for tier in fleet.tiers}
        for worker in fleet.workers.values():
            if worker.stages == DECODE_ONLY:
                decode[worker.tier].append(worker)
        self._observer.look()
        self.latest = targets = self._observer.scaler.targets(fleet.clock.now, *self._states(prefill, decode))
        self._apply(PREFILL_ONLY, "", prefill, targets.prefill)
        for tier, pool in decode.items():
            self._apply(DECODE_ONLY, tier, pool, targets.decode_pools[tier].workers)
        fleet.clock.after(INTERVAL, self.tick)

    def _states(
        self, prefill: list[SimWorker], decode: Mapping[str, list[SimWorker]]
    ) -> tuple[PoolState, dict[str, PoolState]]:
        jobs = list(self._fleet.open)
        ahead = [job for job in jobs if job.state in (JobState.PLACED, JobState.WANTS_PREFILL)]
        engines = [w.prefill for w in prefill if w.prefill is not None]
        states = {}
        for tier, pool in decode.items():
            waiting = [job.prompt_tokens for job in jobs if job.state is JobState.WAITING and job.tier == tier]
            states[tier] = PoolState(
                **_counts(pool),
                waiting_jobs=len(waiting),
                waiting_tokens=sum(waiting),
                running=sum(w.decode.batch for w in pool if w.decode is not None),
                kv_tokens=self._fleet.tiers[tier].profile.decode.kv_tokens,
            )
        return PoolState(
            **_counts(prefill),
            waiting_jobs=len(ahead) + sum(len(engine.waiting) for engine in engines),
            waiting_tokens=sum(job.prompt_tokens for job in ahead) + sum(engine.queued_tokens for engine in engines),
            running=sum(engine.num_admitted for engine in engines),
        ), states

    def _apply(self, stages: Stages, tier: str, pool: list[SimWorker], target: int) -> None:
        fleet = self._fleet
        staying = [worker for worker in pool if not worker.draining]
        for _ in range(target - len(staying)):
            limit = self._config.max_total
            # A draining worker occupies its machine until it has left.
            if limit is not None and len(fleet.workers) >= limit:
                return
            fleet.start_worker(stages, fleet.profile.startup, tier)
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

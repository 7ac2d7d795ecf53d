"""Feeds the router's scaling policy in the simulation. ``Simulation`` applies its targets.

Runs with brownouts and with colocated workers feed it too, because it predicts the time between tokens.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from overfill.lab.simulate.clock import Clock
from overfill.lab.simulate.options import SimTier
from overfill.lab.simulate.request import SimRequest
from overfill.lab.simulate.workers import DECODE_ONLY, PREFILL_ONLY, SimWorker
from overfill.routing.job import Job, JobState
from overfill.routing.scaling import PoolState, Scaler, Targets


class LoadObserver:
    """Feeds a scaling policy with what a router knows: arrivals, answers, and prefill workers' busy time.

    Args:
        scaler: The policy.
        workers: All workers; the simulation adds and removes them.
    """

    def __init__(
        self, clock: Clock, scaler: Scaler, tiers: Mapping[str, SimTier], workers: Mapping[str, SimWorker]
    ) -> None:
        self._clock, self.scaler, self._tiers, self._workers = clock, scaler, tiers, workers
        self._worked: dict[str, tuple[int, float]] = {}  # prefill worker -> (tokens, busy seconds) at the last look

    def arrived(self, request: SimRequest, hit_rate: float) -> None:
        """Notes an arrival. ``hit_rate`` is the share of prompts' tokens that were cached so far."""
        tokens = request.trace.prompt_tokens
        self.scaler.arrived(request.asked, self._clock.now, tokens, int(hit_rate * tokens))

    def finished(self, request: SimRequest) -> None:
        job, trace = request.job, request.trace
        worker = job.decode
        running = worker.report.load.running if worker is not None and worker.report is not None else 0
        self.scaler.finished(
            job.tier, self._clock.now, trace.prompt_tokens, trace.output_tokens, request.outcome.itl, running
        )

    def short_prompts(self) -> dict[str, float]:
        """Returns the length of a short prompt for each tier, as ``ScalingAdvisor`` does."""
        self._look()
        found = {}
        for tier in self._tiers:
            pool = [w.decode for w in self._workers.values() if w.decode is not None and w.tier == tier]
            batch = sum(engine.batch for engine in pool) / max(1, len(pool))
            found[tier] = self.scaler.short_prompt(tier, batch)
        return found

    def targets(self, jobs: Collection[Job]) -> Targets:
        """Returns the numbers of workers that the policy wants, given the jobs of all open requests."""
        self._look()
        workers = self._workers.values()
        prefill = [w for w in workers if w.stages == PREFILL_ONLY]
        engines = [w.prefill for w in prefill if w.prefill is not None]
        ahead = [job for job in jobs if job.state in (JobState.PLACED, JobState.WANTS_PREFILL)]
        decode = {}
        for name, tier in self._tiers.items():
            pool = [w for w in workers if w.stages == DECODE_ONLY and w.tier == name]
            waiting = [job.prompt_tokens for job in jobs if job.state is JobState.WAITING and job.tier == name]
            decode[name] = PoolState(
                **_counts(pool),
                waiting_jobs=len(waiting),
                waiting_tokens=sum(waiting),
                running=sum(w.decode.batch for w in pool if w.decode is not None),
                kv_tokens=tier.profile.decode.kv_tokens,
            )
        state = PoolState(
            **_counts(prefill),
            waiting_jobs=len(ahead) + sum(len(engine.waiting) for engine in engines),
            waiting_tokens=sum(job.prompt_tokens for job in ahead) + sum(engine.queued_tokens for engine in engines),
            running=sum(engine.num_admitted for engine in engines),
        )
        return self.scaler.targets(self._clock.now, state, decode)

    def _look(self) -> None:
        """Notes what the prefill workers have computed since the last call."""
        for worker in self._workers.values():
            if (engine := worker.prefill) is not None:
                tokens, seconds = self._worked.get(worker.name, (0, 0.0))
                self._worked[worker.name] = engine.computed, engine.busy
                self.scaler.prefilled(engine.computed - tokens, engine.busy - seconds)


def _counts(pool: Sequence[SimWorker]) -> dict[str, int]:
    return {
        "ready": sum(w.ready_since is not None and not w.draining for w in pool),
        "starting": sum(w.ready_since is None for w in pool),
        "draining": sum(w.draining for w in pool),
    }

"""What the router's scaling policy is told of simulated workers. ``Simulation`` applies its targets.

Runs with colocated workers tell it too, because it knows how long a short prompt is.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from overfill.lab.simulate.options import SimTier
from overfill.lab.simulate.workers import DECODE_ONLY, PREFILL_ONLY, SimWorker
from overfill.routing.job import Job, JobState
from overfill.routing.scaling import PoolState, Scaler


def note_work(scaler: Scaler, workers: Collection[SimWorker]) -> None:
    """Tells the policy what the prefill workers have computed since the last call."""
    for worker in workers:
        if worker.prefill is not None:
            scaler.prefilled(*worker.prefill.take_work())


def short_prompts(scaler: Scaler, tiers: Collection[str], workers: Collection[SimWorker]) -> dict[str, float]:
    """Returns the length of a short prompt for each tier, as ``ScalingAdvisor`` does."""
    found = {}
    for tier in tiers:
        batches = [worker.decode.batch for worker in workers if worker.decode is not None and worker.tier == tier]
        found[tier] = scaler.short_prompt(tier, sum(batches) / max(1, len(batches)))
    return found


def pool_states(
    tiers: Mapping[str, SimTier], workers: Collection[SimWorker], jobs: Collection[Job]
) -> tuple[PoolState, dict[str, PoolState]]:
    """Returns the state of the prefill pool and of each tier's decode pool, given the jobs of all open requests."""
    decode = {}
    for name, tier in tiers.items():
        pool = [worker for worker in workers if worker.stages == DECODE_ONLY and worker.tier == name]
        waiting = [job.prompt_tokens for job in jobs if job.state is JobState.WAITING and job.tier == name]
        decode[name] = _state(
            pool,
            waiting_jobs=len(waiting),
            waiting_tokens=sum(waiting),
            running=sum(worker.decode.batch for worker in pool if worker.decode is not None),
            kv_tokens=tier.profile.decode.kv_tokens,
        )
    pool = [worker for worker in workers if worker.stages == PREFILL_ONLY]
    engines = [worker.prefill for worker in pool if worker.prefill is not None]
    ahead = [job.prompt_tokens for job in jobs if job.state in (JobState.PLACED, JobState.WANTS_PREFILL)]
    prefill = _state(
        pool,
        waiting_jobs=len(ahead) + sum(len(engine.waiting) for engine in engines),
        waiting_tokens=sum(ahead) + sum(engine.queued_tokens for engine in engines),
        running=sum(len(engine.admitted) for engine in engines),
    )
    return prefill, decode


def _state(pool: Sequence[SimWorker], **load: int) -> PoolState:
    starting, draining = sum(not worker.entries for worker in pool), sum(worker.draining for worker in pool)
    return PoolState(ready=len(pool) - starting - draining, starting=starting, draining=draining, **load)

"""Checks the dispatcher against the *Waiting* rule by brute force: every job against every worker.

Tests and ``overfill simulate --check`` call it. Serving code does not import it.
"""

from __future__ import annotations

from collections.abc import Iterable

from overfill.routing.dispatcher import Dispatcher
from overfill.routing.fair_queue import FairQueue
from overfill.routing.job import Job, JobState
from overfill.routing.pool import Pool, Roster
from overfill.routing.pool_invariant import check_pool, check_prefixes, require
from overfill.routing.tier import Adapter
from overfill.routing.worker import PREFILL, Worker


def check(dispatcher: Dispatcher, now: float) -> None:
    """Raises AssertionError if a count is wrong, or if a job waits although an admissible worker exists.

    Call it after ``dispatcher.poll``.
    """
    roster, reserving, prefill_queue = dispatcher._roster, dispatcher._reserving, dispatcher._prefill_queue
    _check_books(dispatcher)
    for pool in roster.pools():
        check_pool(pool, now)
    check_prefixes(roster.prefixes, roster.workers())
    _check_adapters(roster)
    for job in dispatcher.waiting():
        for pool, tokens in ((roster.prefill, job.prompt_tokens), (roster.decode[job.tier], job.total_tokens)):
            lasting = [w for w in _having(pool, job) if not w.draining]
            require(not lasting or any(w.could_hold(tokens) for w in lasting), f"{job.id} waits although too large")
        if job.adapter is not None and job.state is JobState.WAITING:
            known = roster.adapters.get(job.adapter.name)
            require(known == job.adapter, f"{job.id} waits for an adapter that was unloaded")
    for job in prefill_queue:
        require(not _prefill_choices(roster, job, now), f"{job.id} waits although a prefill slot is free")
    slots = sum(w.credits_left for w in roster.prefill if w.admissible(now)) - len(reserving) - len(prefill_queue)
    for tier in dispatcher._tiers.values():
        _check_decode_queue(dispatcher, tier.jobs, tier.pool, slots, now)


def _check_decode_queue(dispatcher: Dispatcher, queue: FairQueue, pool: Pool, slots: int, now: float) -> None:
    claimants: dict[Adapter | None, Job] = {}
    for job in queue:
        other = dispatcher._roster.decode.get(job.fallback, ())
        if any(w.alive(now) for w in other) and any(w.could_hold(job.total_tokens) for w in other if not w.draining):
            require(any(w.alive(now) or w.starting for w in pool), f"{job.id} waits although it may fall back")
        choices: list[Worker] = []
        if slots > 0 and _prefill_choices(dispatcher._roster, job, now):
            large = _usable(pool, job, job.total_tokens, now)
            choices = [w for w in large if w.admissible(now) and w.has_room(job.reserve_tokens)]
        for claimant in claimants.values():
            choices = [w for w in choices if not (w.has(claimant.adapter) and w.could_hold(claimant.total_tokens))]
        if now - job.waiting_since >= dispatcher._claim_after:
            claimants.setdefault(job.adapter, job)
        require(not choices, f"{job.id} waits although a decode worker can take it")


def _check_books(dispatcher: Dispatcher) -> None:
    roster, jobs, reserving = dispatcher._roster, dispatcher._jobs, dispatcher._reserving
    tiers, prefill_queue = dispatcher._tiers, dispatcher._prefill_queue
    for pools, attribute in ((roster.decode.values(), "decode"), ([roster.prefill], "prefill")):
        held: dict[Worker, int] = {}
        for job in jobs:
            if (worker := getattr(job, attribute)) is not None:
                held[worker] = held.get(worker, 0) + 1
        for worker in {*(worker for pool in pools for worker in pool), *held}:
            require(worker.in_flight == held.get(worker, 0), f"{worker.id} counts {worker.in_flight} requests")
    for job in jobs:
        require(job.state is not JobState.FINISHED, f"{job.id} is finished and still listed")
        for name, tier in tiers.items():
            waits = job.state is JobState.WAITING and job.tier == name
            require((job in tier.jobs) == waits, f"{job.id}: queue of the tier {name}")
        require(job.decode is None or job.decode.info.tier == job.tier, f"{job.id} is on a worker of another tier")
        require((job in prefill_queue) == (job.state is JobState.WANTS_PREFILL), f"{job.id}: prefill queue")
        require((job.decode is None) == (job.state in (JobState.NEW, JobState.WAITING)), f"{job.id}: decode")
        require(job.prefill is None or job.state in (JobState.PLACED, JobState.RUNNING), f"{job.id}: prefill")
        holder = job.expected.holder
        require(holder is None or job.prefill is not None, f"{job.id} has a holder and no prefill worker")
        require(holder is None or holder is not job.prefill, f"{job.id}: a worker is to borrow from itself")
    require({*dispatcher.waiting()} <= jobs, "a finished job waits")
    placed = {j for j in jobs if j.state is JobState.PLACED}
    on_time = dispatcher.reservations.on_time
    require(reserving == {j for j in on_time if j.prefill is None}, "jobs for which a prefill slot is kept")
    require({j for j in placed if j.prefill is not None} <= on_time, "a late decode worker holds a prefill slot")
    require(on_time | dispatcher.reservations.overdue <= placed, "jobs for which an answer is awaited")
    for queue in (*(tier.jobs for tier in tiers.values()), prefill_queue):
        require(queue.smallest_need == min((j.reserve_tokens for j in queue), default=0), "the smallest need")
        require(_ordered(queue), "migrated work and smaller priorities go first")


def _ordered(queue: Iterable[Job]) -> bool:
    claims = [(not job.migrated, job.priority) for job in queue]
    return claims == sorted(claims)


def _prefill_choices(roster: Roster, job: Job, now: float) -> list[Worker]:
    return [w for w in _usable(roster.prefill, job, job.prompt_tokens, now) if w.admissible(now)]


def _having(pool: Pool, job: Job) -> list[Worker]:
    return [w for w in pool if w.info.stage == PREFILL or w.has(job.adapter)]


def _check_adapters(roster: Roster) -> None:
    found: dict[str, set[Worker]] = {adapter.name: set() for adapter in roster.adapters.known()}
    for tier, pool in roster.decode.items():
        for worker in pool:
            for name, adapter in worker.adapters.items():
                known = roster.adapters.get(name)
                require(adapter == known and adapter.tier == tier, f"{worker.id} has {adapter}, but {known} is known")
                found[name].add(worker)
    for name, workers in found.items():
        known = roster.adapters.get(name)
        require(known is not None and {*roster.adapters.holders(known)} == workers, f"the workers with {name}")


def _usable(pool: Pool, job: Job, tokens: int, now: float) -> list[Worker]:
    """Returns the workers that are large enough, with those that failed the job only if no other is alive."""
    large = [w for w in _having(pool, job) if w.could_hold(tokens)]
    others = [w for w in large if w.seat not in job.avoid and w.alive(now)]
    return others or large

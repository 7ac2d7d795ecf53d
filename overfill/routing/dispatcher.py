"""Places requests on workers and queues the rest, by the *Waiting* rule. Plain bookkeeping, no I/O, no clock.

A request first gets a decode worker, which reserves blocks, and only then a prefill slot. It waits only while no
admissible combination of the two exists::

    NEW -> WAITING -> PLACED -> WANTS_PREFILL -> RUNNING -> FINISHED
              ^         | |           ^           ^ |
              +-refused-+ |           +-need_prefill+
                          +-- prefill_with_start -+

``prefill_with_start`` takes a free prefill slot before the blocks are reserved, to save a round trip. The decode worker
reserves the blocks or refuses; it never waits for blocks. So the slot is held for one round trip, and no request gets
one whose grammar the worker must compile first. A job whose decode worker does not answer gives its slot back after
``RESERVE_TIMEOUT``: all tiers share the slots. The dispatcher places no more on a worker that answers nothing. Both are
watched by ``routing.reservations``.

Each tier has its own pool of decode workers and its own queue for them, so a full tier does not hold up another. All
tiers share the prefill workers. When these are the bottleneck, the tiers alternate.

``routing.fair_queue`` gives the order within a tier. A small request may overtake a large one that does not fit, until
the large one has waited ``claim_after`` seconds. A placement does not look at every worker, nor at every waiting
request: the pools' indexes and the queue show when no placement is possible. Tests check the result with
``routing.invariant`` by brute force.

A request with an adapter goes only to decode workers that have the adapter. While it waits for one, it holds up only
requests for these workers. It ends when the last of them has unloaded the adapter, or has been absent for too long.

Callers report events (``submit``, ``reserved``, ``refused`` ...) and then call ``poll``, which returns the outcomes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from overfill.errors import OverfillError, PromptTooLong, Unavailable
from overfill.routing.admission import Admission
from overfill.routing.candidates import Claims, find, too_large
from overfill.routing.fair_queue import FairQueue
from overfill.routing.job import ExpectedKv, Job, JobState
from overfill.routing.pool import Pool, Roster
from overfill.routing.reservations import Reservations
from overfill.routing.worker import Worker
from overfill.v1 import decode_pb2, registry_pb2

STARTUP_MARGIN = 2.0
"""Default of ``absent_after``, as a multiple of the stage's longest start-up time.

The margin covers the time to notice the loss, and a slower start on a busy machine.
"""

MIN_ABSENT_AFTER = 10.0
"""Lower bound of that default, in seconds."""


@dataclass(frozen=True, slots=True)
class Placement:
    """``job`` is placed on ``worker``, which counts it already."""

    job: Job
    worker: Worker


@dataclass(frozen=True, slots=True)
class Rejection:
    """``job`` ended with ``error`` while it waited."""

    job: Job
    error: OverfillError


class _TierQueue:
    """The jobs that wait for a decode worker of one tier, and their admission.

    Attributes:
        last_placed: ordinal of the tier's latest placement; 0 before the first.
    """

    def __init__(self, pool: Pool, max_queue: int, max_wait: float | None) -> None:
        self.pool = pool
        self.jobs: FairQueue = FairQueue()
        self.admission = Admission(max_queue, max_wait)
        self.last_placed = 0


class Dispatcher:
    """Places jobs on the workers of a roster.

    Args:
        roster: the workers. The registry adds and removes them and calls ``poll`` afterwards.
        max_queue: maximum number of jobs of one priority that wait for a decode worker of a tier; more are refused.
        max_wait: longest expected wait in seconds with which a new job is admitted. None means no limit.
        claim_after: seconds after which the first blocked job in a tier's order claims capacity, and the first with
            each adapter. No job behind it is then placed on a decode worker that can hold it.
        absent_after: seconds without any worker of a pool after which the jobs that wait for one are rejected. A silent
            worker that was ready does not count as present. None means the time that a replacement probably needs,
            from the start-up times of the pool's workers.

    Attributes:
        reservations: the placed jobs whose decode workers have not answered yet. Only the dispatcher changes it.
    """

    def __init__(
        self,
        roster: Roster,
        *,
        max_queue: int = 1024,
        max_wait: float | None = None,
        claim_after: float = 5.0,
        absent_after: float | None = None,
    ) -> None:
        self._roster = roster
        self._tiers = {name: _TierQueue(pool, max_queue, max_wait) for name, pool in roster.decode.items()}
        self._claim_after = claim_after
        self._absent_after = absent_after
        self._jobs: set[Job] = set()
        self._reserving: set[Job] = set()  # placed jobs without a prefill slot, for which one is kept
        self.reservations = Reservations()
        self._prefill_queue: FairQueue = FairQueue(fair=False)
        self._absent_since: dict[Pool, float] = {}
        self._changes = -1  # of the workers when the waiting jobs were checked last
        self._decode_placements = 0
        self._newly_queued: list[Job] = []  # jobs queued since the last poll

    @property
    def num_waiting(self) -> int:
        """Number of jobs that wait for a worker of either stage."""
        return self._num_waiting_for_decode + len(self._prefill_queue)

    @property
    def _num_waiting_for_decode(self) -> int:
        return sum(len(tier.jobs) for tier in self._tiers.values())

    def waiting_by_tier(self) -> dict[str, int]:
        """Number of jobs that wait for a worker of either stage, by tier. Callable from any thread."""
        waiting = {name: len(tier.jobs) for name, tier in self._tiers.items()}
        for job in self._prefill_queue.snapshot():
            waiting[job.tier] += 1
        return waiting

    def running_by_tier(self) -> dict[str, int]:
        """Number of jobs that run on workers, by tier. Callable from any thread."""
        running = dict.fromkeys(self._tiers, 0)
        for job in list(self._jobs):
            running[job.tier] += job.state in (JobState.PLACED, JobState.RUNNING)
        return running

    def waiting(self) -> Iterator[Job]:
        """Yields the jobs that wait for a worker of either stage."""
        for tier in self._tiers.values():
            yield from tier.jobs
        yield from self._prefill_queue

    def queued(self, pool: Pool) -> int:
        """Number of jobs that wait for a worker of ``pool``.

        When no prefill slot is free, jobs that wait for a decode worker count for prefill as well.
        """
        if pool is not self._roster.prefill:
            return len(self._waiting_for(pool))
        return len(self._prefill_queue) + (self._num_waiting_for_decode if self._free_prefill_slots <= 0 else 0)

    @property
    def _free_prefill_slots(self) -> int:
        """Prefill slots that are left when each job on a decode worker that will need one has one."""
        return self._roster.prefill.index.free_credits - len(self._reserving) - len(self._prefill_queue)

    @property
    def num_jobs(self) -> int:
        """Number of jobs that are not finished."""
        return len(self._jobs)

    def expected_ttft(self, tier: str, now: float) -> float:
        """Seconds until the first token of a new job with priority 0, as far as its tier's queue decides.

        While no rate of departures is known, it is the time for which the first job has waited.
        """
        queue = self._tiers[tier]
        waited = max(0.0, now - next(iter(queue.jobs)).waiting_since) if queue.jobs else 0.0
        # When no worker takes another job now, a new one waits for a departure even if it is the first in the queue.
        ahead = queue.jobs.ahead(0, "") + (not queue.pool.index.free_credits)
        expected = queue.admission.expected_ttft(ahead)
        return waited if expected is None else max(expected, waited)

    def idle_ttft(self, tier: str) -> float:
        """Seconds until the first token of a new job that need not wait for a decode worker; 0 while unknown."""
        return self._tiers[tier].admission.median_first_token

    def prefill_is_free(self) -> bool:
        """True if a new job would get a prefill slot as soon as it has a decode worker."""
        return self._free_prefill_slots > 0

    def admit(
        self,
        tier: str,
        priority: int,
        key: str,
        now: float,
        deadline: float | None,
        *,
        session: str = "",
        client_resumes: bool = False,
    ) -> None:
        """Raises if a new job would be refused now. It is cheap; call it before any other work for a request.

        Args:
            tier: tier that would write its answer.
            session: its session, within the key.
            client_resumes: True if the client has part of the answer already.

        Raises:
            Overloaded: the job would be refused; the error says when to try again.
        """
        queue = self._tiers[tier]
        waiting, ahead = queue.jobs.waiting(priority), queue.jobs.ahead(priority, key, session)
        own = queue.jobs.waiting_of(priority, key) if key else 0
        queue.admission.check(waiting, ahead, now, deadline, own, client_resumes=client_resumes)

    def submit(self, job: Job, now: float) -> None:
        """Queues a new job.

        Raises:
            PromptTooLong: no joined worker can ever hold the job.
            Overloaded: see ``admit``.
        """
        if error := self._too_large(job):
            raise error
        resumes = bool(job.emitted)
        self.admit(job.tier, job.priority, job.key, now, job.deadline, session=job.session, client_resumes=resumes)
        self._jobs.add(job)
        self._wait(job, now)

    def prefill_with_start(self, job: Job) -> Worker | None:
        """Takes a prefill slot for a job that has just been placed, so that ``StartDecode`` can carry the assignment.

        Returns None if no slot is free for the job, or another job needs the free ones: a migrated job that waits for a
        slot, or a job whose blocks are being reserved. Returns None for a job whose grammar the worker compiles first.
        """
        pool, waiting = self._roster.prefill, next(iter(self._prefill_queue), None)
        needed = len(self._reserving) + len(self._prefill_queue)
        if job.compiles or job not in self._reserving:
            return None
        if pool.index.free_credits < needed or (waiting and waiting.migrated):
            return None
        worker = find(pool, job, job.prompt_tokens)
        if worker is not None:
            self._reserving.discard(job)
            self._assign_prefill(job, worker)
        return worker

    def reserved(self, job: Job, *, has_prompt: bool = False) -> bool:
        """Notes that the job's decode worker has reserved blocks.

        Args:
            has_prompt: whether the decode worker needs no prefill worker. A slot that the job holds becomes free.

        Returns:
            True if the job holds a prefill slot already, or needs none; otherwise it is queued for one.
        """
        late_prefill = job.late_prefill
        self._answered(job)
        # Count it now, because a worker that refuses a job puts it back into the queue.
        if job.placed_at is not None and job.placed_at > job.waiting_since:
            self._tiers[job.tier].admission.departure_rate.departed()
        if has_prompt:
            self.prefill_done(job)
            self._run(job)
            return True
        if late_prefill is not None and self._roster.prefill.get(late_prefill.id) is late_prefill:
            self._assign_prefill(job, late_prefill)  # beyond its credits if need be: the decode worker turns to it now
        if job.prefill is None:
            self._want_prefill(job)
            return False
        self._run(job)
        return True

    def refused(self, job: Job, load: decode_pb2.WorkerLoad | None = None) -> None:
        """Puts the job back at the front: its decode worker refused it. The worker is paused until its next report.

        Args:
            load: the worker's load from its refusal, or None.
        """
        self._answered(job)
        if job.decode is not None:
            self._decode_pool(job).refused(job.decode, load)
        self._detach(job)
        job.state = JobState.WAITING
        self._tiers[job.tier].jobs.push_front(job)
        self._newly_queued.append(job)

    def lost(self, job: Job, now: float, *, gone: bool) -> None:
        """Queues the job for another decode worker: the last one failed it.

        Args:
            gone: True if the worker could not be reached or vanished. It is then paused until its next report.
        """
        if job.decode is not None:
            job.avoid.add(job.decode.seat)
            if gone:
                for worker in self._roster.find_all(job.decode.id):  # both stages of it, if it has both
                    if worker.process == job.decode.process:
                        job.avoid.add(worker.seat)
                        self._roster.pool_of(worker).pause(worker)
        self._detach(job)
        job.migrated = True
        self._wait(job, now)

    def need_prefill(self, job: Job, tried: Worker | None, *, failed: bool, pause: bool) -> None:
        """Queues the job for another prefill slot: its decode worker needs the prompt's KV again.

        Args:
            tried: prefill worker that was assigned last; None if the decode worker names another one.
            failed: True if ``tried`` failed the job. The job avoids it while another one is alive.
            pause: True to pause ``tried`` until its next report.
        """
        if tried is not None:
            if failed:
                job.avoid.add(tried.seat)
            if pause:
                self._roster.prefill.pause(tried)
        self.prefill_done(job)
        job.migrated = True
        self._want_prefill(job)

    def prefill_done(self, job: Job, now: float | None = None) -> None:
        """Releases the job's prefill slot, if it holds one, and ends its wait for one.

        A draining worker with both stages does not wait for a slot: it prefills its own sequences.

        Args:
            now: current time if the first token has arrived, else None.
        """
        if job.state is JobState.WANTS_PREFILL and now is not None:
            self._prefill_queue.discard(job)
            self._run(job)
        if job.prefill is not None:
            pool = self._roster.prefill
            pool.release(job.prefill)
            if now is None:
                pool.prefixes.not_computed(job, job.prefill)
            job.prefill, job.expected = None, ExpectedKv()
            if now is not None and job.placed_at is not None and not job.migrated:
                self._tiers[job.tier].admission.first_token(now - job.placed_at)

    def finish(self, job: Job) -> None:
        """Removes the job and releases its slots. It may be in any state, and the call may be repeated."""
        if job in self._jobs:
            self._tiers[job.tier].jobs.refund(job, max(0, job.charged - job.used_tokens))
        self._detach(job)
        job.state = JobState.FINISHED
        self._jobs.discard(job)

    def report(self, worker: Worker, report: registry_pb2.Report, now: float) -> None:
        """Applies a worker's report."""
        self._roster.pool_of(worker).report(worker, report, now)

    def poll(self, now: float) -> list[Placement | Rejection]:
        """Makes every placement that is possible now, and rejects jobs that no worker can serve."""
        self._observe_departures(now)
        self._expire_reservations(now)
        for pool in self._roster.pools():
            pool.expire(now)
        self._fall_back(now)
        outcomes: list[Placement | Rejection] = [*self._reject_absent(now), *self._check_waiting(now)]
        if self._prefill_queue:
            outcomes += self._place_prefill()
        outcomes += self._place_decode(now)
        self._observe_departures(now)
        return outcomes

    def _observe_departures(self, now: float) -> None:
        for tier in self._tiers.values():
            tier.admission.departure_rate.observe(now, len(tier.jobs))

    def _expire_reservations(self, now: float) -> None:
        """Frees the prefill slots of jobs whose decode workers are late, and pauses the workers that are silent."""
        for job in self.reservations.expire(now):
            self._reserving.discard(job)
            if job.prefill is not None:
                job.late_prefill = job.prefill
                self.prefill_done(job)
        for worker in self.reservations.silent(now):
            if not worker.paused_until_report:  # a report has ended its pause
                self._roster.pool_of(worker).pause(worker)

    def _answered(self, job: Job) -> None:
        """Notes that the job's decode worker has reserved its blocks or refused it."""
        self.reservations.answered(job)
        self._forget_placement(job)

    def _forget_placement(self, job: Job) -> None:
        self.reservations.forget(job)
        self._reserving.discard(job)
        job.late_prefill = None

    def _wait(self, job: Job, now: float) -> None:
        job.state = JobState.WAITING
        job.waiting_since = now
        self._tiers[job.tier].jobs.append(job)
        self._newly_queued.append(job)

    def _decode_pool(self, job: Job) -> Pool:
        return self._roster.decode[job.tier]

    def _fall_back(self, now: float) -> None:
        """Moves the jobs that may leave a tier without workers to the tiers to which they fall back."""
        for tier in self._tiers.values():
            if tier.pool.index.present:
                continue
            for job in [job for job in tier.jobs if job.fallback]:
                other = self._roster.decode[job.fallback].index
                if other.present and other.not_draining.largest >= job.total_tokens:
                    tier.jobs.discard(job)
                    tier.jobs.refund(job, max(0, job.charged - job.used_tokens))
                    job.tier, job.charged = job.fallback, 0
                    self._wait(job, now)

    def _want_prefill(self, job: Job) -> None:
        job.state = JobState.WANTS_PREFILL
        self._prefill_queue.append(job)
        self._newly_queued.append(job)

    def _detach(self, job: Job) -> None:
        """Removes the job from the queues and from its workers."""
        self._forget_placement(job)
        self._tiers[job.tier].jobs.discard(job)
        self._prefill_queue.discard(job)
        self.prefill_done(job)
        if job.decode is not None:
            self._decode_pool(job).release(job.decode)
            job.decode = None

    def _place_prefill(self) -> Iterator[Placement]:
        pool = self._roster.prefill
        for job in self._prefill_queue:
            if not pool.index.free_credits:
                return
            worker = find(pool, job, job.prompt_tokens)
            if worker is None:
                continue
            self._assign_prefill(job, worker)
            self._prefill_queue.take(job)
            self._run(job)
            yield Placement(job, worker)

    def _assign_prefill(self, job: Job, worker: Worker) -> None:
        pool = self._roster.prefill
        job.prefill, job.expected = worker, pool.prefixes.place(job, worker)
        pool.policy.placed(job, worker)
        pool.place(worker, job.prompt_tokens, job.prompt_tokens - job.expected.cost)

    def _run(self, job: Job) -> None:
        job.state = JobState.RUNNING
        job.prefilled = True

    def _place_decode(self, now: float) -> Iterator[Placement]:
        """Places waiting jobs on decode workers: the best rank first, then the tier with the oldest placement."""
        # Placing a job of one tier changes nothing for the next job of another but the number of free prefill slots.
        searches = {tier: self._placeable(tier, now) for tier in self._tiers.values() if tier.jobs}
        found = {tier: first for tier, search in searches.items() if (first := next(search, None)) is not None}

        def rank(tier: _TierQueue) -> tuple[bool, int, int]:
            job, _ = found[tier]
            return not job.migrated, job.priority, tier.last_placed  # resumed work goes first, then priority counts

        while found and self._free_prefill_slots > 0:
            tier = min(found, key=rank)
            yield self._place(*found.pop(tier), now)
            if (following := next(searches[tier], None)) is not None:
                found[tier] = following

    def _placeable(self, tier: _TierQueue, now: float) -> Iterator[tuple[Job, Worker]]:
        """Yields the jobs of a tier that can be placed now, in order. The caller places each before the next."""
        pool, queue, claims = tier.pool, tier.jobs, Claims(tier.pool)
        for job in queue:
            if self._free_prefill_slots <= 0 or pool.index.max_room < queue.smallest_need or claims.on_all():
                return
            worker, tried = None, claims.may_leave_room(job)
            if tried and self._prefill_may_come(job):
                worker = find(pool, job, job.total_tokens, job.reserve_tokens, claims)
            if worker is not None:
                yield job, worker
                continue
            if now - job.waiting_since >= self._claim_after:
                claims.add(job)
            if tried:
                claims.blocked(job)

    def _prefill_may_come(self, job: Job) -> bool:
        """True if a prefill worker can take the job now. The worker is chosen once blocks are reserved."""
        pool = self._roster.prefill
        if not job.avoid:
            return pool.index.admissible.largest >= job.prompt_tokens
        return find(pool, job, job.prompt_tokens) is not None

    def _place(self, job: Job, worker: Worker, now: float) -> Placement:
        tier = self._tiers[job.tier]
        self._decode_placements += 1
        tier.last_placed = self._decode_placements
        job.decode, job.placed_at = worker, now
        tier.pool.policy.placed(job, worker)
        tier.pool.place(worker, job.reserve_tokens)
        tier.jobs.take(job)
        self._reserving.add(job)
        self.reservations.add(job, worker)
        job.state = JobState.PLACED
        return Placement(job, worker)

    def _too_large(self, job: Job) -> PromptTooLong | None:
        in_prefill = too_large(self._roster.prefill, job, job.prompt_tokens)
        return in_prefill or too_large(self._decode_pool(job), job, job.total_tokens)

    def _check_waiting(self, now: float) -> Iterator[Rejection]:
        """Rejects waiting jobs that have become too large for every worker, or whose adapter no worker has any more.

        Checks newly queued jobs always, because workers may have changed while the jobs were on a worker. Checks all
        jobs when a pool's workers have changed.
        """
        adapters = self._roster.adapters
        expired = adapters.expire(now, lambda tier: self._max_absence(self._roster.decode[tier]))
        changes = self._roster.changes
        queued, self._newly_queued = self._newly_queued, []
        if changes != self._changes:
            self._changes, queued = changes, list(self.waiting())
        for job in queued:
            if job.state not in (JobState.WAITING, JobState.WANTS_PREFILL):
                continue
            error: OverfillError | None = self._too_large(job)
            # A decode worker that unloads an adapter finishes the answers that it has begun.
            if job.state is JobState.WAITING and job.adapter is not None:
                error = adapters.loss(job.adapter, expired) or error
            if error is not None:
                yield self._reject(job, error)

    def _reject_absent(self, now: float) -> Iterator[Rejection]:
        for pool in self._roster.pools():
            if pool.index.present:
                self._absent_since.pop(pool, None)
                continue
            absent = now - self._absent_since.setdefault(pool, now)
            if absent < self._max_absence(pool):
                continue
            waiting = list(self.waiting()) if pool is self._roster.prefill else [*self._waiting_for(pool)]
            for job in waiting:
                if job.decode is not None and job.decode.info.colocated and job.decode.draining:
                    continue  # the worker prefills its own sequences while it drains
                yield self._reject(job, Unavailable(f"no {pool.title} has reported for {absent:.0f} s"))

    def _waiting_for(self, pool: Pool) -> FairQueue:
        return next(tier.jobs for tier in self._tiers.values() if tier.pool is pool)

    def _max_absence(self, pool: Pool) -> float:
        """Returns the seconds for which jobs wait while ``pool`` has no worker."""
        if self._absent_after is not None:
            return self._absent_after
        return max(MIN_ABSENT_AFTER, STARTUP_MARGIN * pool.longest_startup)

    def _reject(self, job: Job, error: OverfillError) -> Rejection:
        self.finish(job)
        return Rejection(job, error)

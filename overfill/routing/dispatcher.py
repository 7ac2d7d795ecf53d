"""Which request goes where, and which one waits: the *Waiting* rule. Plain bookkeeping, no I/O, no clock.

A request takes a decode worker first, which reserves blocks, and only then a prefill slot. It waits only
while no admissible combination of the two exists::

    NEW -> WAITING -> PLACED -> WANTS_PREFILL -> RUNNING -> FINISHED
              ^         |             ^             |
              +-refused-+             +-need_prefill+

The order is that of ``routing.line``. A request that does not fit now may be overtaken by one that does, until it
has waited ``reserve_after`` seconds. No decision looks at every worker, nor at every request that waits in vain: the
pools' indexes and the line say when there is nothing to be had. ``routing.invariant`` holds all of it to the rule.

Callers say what happened (``submit``, ``reserved``, ``refused`` ...) and then ask ``poll`` for what follows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

from overfill.errors import OverfillError, PromptTooLong, Unavailable
from overfill.routing import invariant
from overfill.routing.admission import Admission
from overfill.routing.job import Job, JobState
from overfill.routing.line import Line
from overfill.routing.policy import Policy
from overfill.routing.pool import Pool, Roster
from overfill.routing.worker import DECODE, PREFILL, Worker
from overfill.v1 import common_pb2, decode_pb2, registry_pb2

__all__ = ["STAGE_NAMES", "Dispatcher", "Job", "JobState", "Placement", "Rejection"]

STAGE_NAMES = {PREFILL: "prefill", DECODE: "decode"}

STARTUP_MARGIN = 2.0
"""Default of ``absent_after``, as a multiple of the stage's longest start-up time.

The factor covers noticing the loss and starting beside other processes.
"""

MIN_ABSENT_AFTER = 10.0
"""Lower bound of that default, in seconds."""

_TRIES = 16
"""Workers that are looked at in the policy's order before room decides."""


@dataclass(frozen=True, slots=True)
class Placement:
    """``job`` may use ``worker``; it is counted there already."""

    job: Job
    worker: Worker


@dataclass(frozen=True, slots=True)
class Rejection:
    """``job`` waits no longer; it is finished."""

    job: Job
    error: OverfillError


class Dispatcher:
    """Places jobs on the workers of a roster.

    Args:
        roster: the workers; they join and leave it elsewhere, and ``poll`` follows.
        policy: orders the decode workers; None leaves the roster's as it is.
        prefill_policy: orders the prefill workers; by default one of the same kind.
        max_queue: most jobs of one priority waiting for a decode worker before new ones are refused.
        max_wait: seconds that a new job may be expected to wait before it is refused; None: any.
        reserve_after: seconds after which the oldest blocked job reserves capacity: none after it in the
            order is placed on a decode worker that could hold it.
        absent_after: seconds without any worker of a stage after which jobs that need one are rejected. A worker that
            was ready and is silent does not count. None: as long as a replacement is likely to take, by the start-up
            times of the stage's workers.
    """

    def __init__(
        self,
        roster: Roster,
        policy: Policy | None = None,
        *,
        prefill_policy: Policy | None = None,
        max_queue: int = 1024,
        max_wait: float | None = None,
        reserve_after: float = 5.0,
        absent_after: float | None = None,
    ) -> None:
        self._roster = roster
        if policy is not None:
            roster.decode.use(policy)
            roster.prefill.use(prefill_policy or type(policy)())
        self._admission = Admission(max_queue, max_wait)
        self._reserve_after = reserve_after
        self._absent_after = absent_after
        self._jobs: set[Job] = set()
        self._reserving: set[Job] = set()
        self._decode_line: Line[Job] = Line()
        self._prefill_line: Line[Job] = Line(fair=False)
        self._absent_since: dict[common_pb2.Stage, float] = {}
        self._largest: dict[common_pb2.Stage, float] = {}
        self._queued: list[Job] = []  # since the last poll

    @property
    def num_waiting(self) -> int:
        """Jobs waiting for a worker of either stage."""
        return len(self._decode_line) + len(self._prefill_line)

    def waiting(self) -> Iterator[Job]:
        """Those jobs."""
        yield from self._decode_line
        yield from self._prefill_line

    def queued(self, stage: common_pb2.Stage) -> int:
        """Jobs that wait for a worker of ``stage``; for prefill, those too that have no slot to hope for."""
        if stage == DECODE:
            return len(self._decode_line)
        free = self._roster.prefill.index.free_credits - len(self._reserving) - len(self._prefill_line)
        return len(self._prefill_line) + (len(self._decode_line) if free <= 0 else 0)

    @property
    def num_jobs(self) -> int:
        """Jobs that are not finished."""
        return len(self._jobs)

    def admit(self, priority: int, key: str, now: float, deadline: float | None, *, begun: bool = False) -> None:
        """Whether a new job would be taken now; cheap, for before anything else is done about it.

        Args:
            begun: its client has part of the answer.

        Raises:
            Overloaded: it would not; says when to try again.
        """
        line = self._decode_line
        self._admission.check(line.waiting(priority), line.ahead(priority, key), now, deadline, begun=begun)

    def submit(self, job: Job, now: float) -> None:
        """Takes a new job in.

        Raises:
            PromptTooLong: no worker here could ever hold it.
            Overloaded: as ``admit``.
        """
        if error := self._too_large(job):
            raise error
        self.admit(job.priority, job.key, now, job.deadline, begun=bool(job.emitted))
        self._jobs.add(job)
        self._wait(job, now)

    def reserved(self, job: Job) -> None:
        """The decode worker has reserved blocks: the job wants a prefill slot now."""
        self._reserving.discard(job)
        self._want_prefill(job)

    def refused(self, job: Job, load: decode_pb2.WorkerLoad | None = None) -> None:
        """The decode worker would not take it: back to the front. Nothing goes there until it reports.

        Args:
            load: what the worker said of itself, if it did.
        """
        if job.decode is not None:
            self._roster.decode.refused(job.decode, load)
        self._detach(job)
        job.state = JobState.WAITING
        self._decode_line.push_front(job)
        self._queued.append(job)

    def lost(self, job: Job, now: float, *, gone: bool) -> None:
        """The decode worker failed the job: it resumes elsewhere.

        Args:
            gone: the worker could not be reached or vanished, so nothing goes there until it reports again.
        """
        if job.decode is not None:
            job.avoid.add(job.decode.key)
            if gone:
                self._roster.decode.close(job.decode)
        self._detach(job)
        job.resumed = True
        self._wait(job, now)

    def need_prefill(self, job: Job, tried: Worker | None, *, failed: bool, closed: bool) -> None:
        """The decode worker wants KV again.

        Args:
            tried: the prefill worker that was assigned last, if it had a part in it.
            failed: it failed the job, so another is tried while there is one.
            closed: nothing goes to it until its next report.
        """
        if tried is not None:
            if failed:
                job.avoid.add(tried.key)
            if closed:
                self._roster.prefill.close(tried)
        self.prefill_done(job)
        job.resumed = True
        self._want_prefill(job)

    def prefill_done(self, job: Job, now: float | None = None) -> None:
        """Gives the prefill slot back, if the job holds one.

        Args:
            now: given when the reason is that the first token has come.
        """
        if job.prefill is not None:
            self._roster.prefill.release(job.prefill)
            job.prefill = None
            if now is not None and job.placed_at is not None and not job.resumed:
                self._admission.first_token(now - job.placed_at)

    def finish(self, job: Job) -> None:
        """Forgets the job and frees what it holds, in any state, any number of times."""
        if job in self._jobs:
            self._decode_line.used_less(job, max(0, job.charged - job.used_tokens))
        self._detach(job)
        job.state = JobState.FINISHED
        self._jobs.discard(job)

    def report(self, worker: Worker, report: registry_pb2.Report, now: float) -> None:
        """Takes a worker's report."""
        self._roster.pool(worker.info.stage).report(worker, report, now)

    def poll(self, now: float) -> list[Placement | Rejection]:
        """Makes every placement that is possible now and rejects what waits in vain."""
        self._admission.drain.look(now, len(self._decode_line))
        for pool in (self._roster.prefill, self._roster.decode):
            pool.expire(now)
        outcomes: list[Placement | Rejection] = [*self._reject_absent(now), *self._reject_too_large()]
        if self._prefill_line:
            outcomes += self._place_prefill()
        if self._decode_line:
            outcomes += self._place_decode(now)
        self._admission.drain.look(now, len(self._decode_line))
        return outcomes

    def check(self, now: float) -> None:
        """Raises AssertionError unless the books balance and nobody waits in vain. Call after ``poll``."""
        invariant.check(
            self._roster,
            self._jobs,
            self._reserving,
            self._decode_line,
            self._prefill_line,
            self._reserve_after,
            now,
        )

    def _wait(self, job: Job, now: float) -> None:
        job.state = JobState.WAITING
        job.waiting_since = now
        self._decode_line.append(job)
        self._queued.append(job)

    def _want_prefill(self, job: Job) -> None:
        job.state = JobState.WANTS_PREFILL
        self._prefill_line.append(job)
        self._queued.append(job)

    def _detach(self, job: Job) -> None:
        """Takes the job out of every line and off every worker."""
        self._reserving.discard(job)
        self._decode_line.discard(job)
        self._prefill_line.discard(job)
        self.prefill_done(job)
        if job.decode is not None:
            self._roster.decode.release(job.decode)
            job.decode = None

    def _place_prefill(self) -> Iterator[Placement]:
        pool = self._roster.prefill
        for job in self._prefill_line:
            if not pool.index.free_credits:
                return
            worker = self._find(pool, job, job.prompt_tokens)
            if worker is None:
                continue
            job.prefill = worker
            pool.place(worker, job.prompt_tokens, pool.policy.placed(job, worker))
            self._prefill_line.take(job)
            job.state = JobState.RUNNING
            yield Placement(job, worker)

    def _place_decode(self, now: float) -> Iterator[Placement]:
        pool, line = self._roster.decode, self._decode_line
        holder: Job | None = None  # the blocked job that reserves capacity
        for job in line:
            # A prefill slot must be left beyond those that jobs on decode workers are about to take.
            free = self._roster.prefill.index.free_credits - len(self._reserving) - len(self._prefill_line)
            if free <= 0 or pool.index.most_room < line.least_need:
                return
            if holder is not None and pool.index.admissible.least >= holder.total_tokens:
                return  # all that is left is reserved
            worker = None
            if self._prefill_may_come(job):
                worker = self._find(pool, job, job.total_tokens, job.reserve_tokens, holder)
            if worker is not None:
                self._place(job, worker, now)
                yield Placement(job, worker)
            elif holder is None and now - job.waiting_since >= self._reserve_after:
                holder = job

    def _prefill_may_come(self, job: Job) -> bool:
        """Whether a prefill worker would take the job now; which one is decided when its blocks are reserved."""
        pool = self._roster.prefill
        if not job.avoid:
            return pool.index.admissible.most >= job.prompt_tokens
        return self._find(pool, job, job.prompt_tokens) is not None

    def _place(self, job: Job, worker: Worker, now: float) -> None:
        if now > job.waiting_since:
            self._admission.drain.departed()
        pool = self._roster.decode
        job.decode, job.placed_at = worker, now
        pool.policy.placed(job, worker)
        pool.place(worker, job.reserve_tokens)
        self._decode_line.take(job)
        self._reserving.add(job)
        job.state = JobState.PLACED

    def _find(
        self, pool: Pool, job: Job, tokens: int, room: int | None = None, holder: Job | None = None
    ) -> Worker | None:
        """The best admissible worker for ``job``.

        Args:
            tokens: that it must be able to hold.
            room: tokens that must fit now; None: any.
            holder: a job for which all that could hold it are kept.
        """
        index = pool.index
        if index.admissible.most < tokens or (room is not None and index.most_room < room):
            return None
        # Those that failed the job are tried again only when none of the others is alive.
        avoid = job.avoid if job.avoid and self._others_alive(pool, job, tokens) else ()

        def fits(worker: Worker) -> bool:
            return (
                worker.could_hold(tokens)
                and (room is None or worker.has_room(room))
                and (not avoid or worker.key not in avoid)
                and (holder is None or not worker.could_hold(holder.total_tokens))
            )

        best = pool.policy.best(job)
        if room is None:
            return next((worker for worker in best if fits(worker)), None)
        worker = next((worker for worker in islice(best, _TRIES) if fits(worker)), None)
        return worker or next((worker for worker in index.by_room(room) if fits(worker)), None)

    def _others_alive(self, pool: Pool, job: Job, tokens: int) -> bool:
        """Whether a worker is alive that is large enough and has not failed the job."""
        failed = 0
        for worker_id, incarnation in job.avoid:
            worker = pool.get(worker_id)
            if worker is not None and worker.info.incarnation == incarnation and worker.could_hold(tokens):
                failed += pool.index.is_alive(worker)
        return pool.index.alive.holding(tokens) > failed

    def _too_large(self, job: Job) -> PromptTooLong | None:
        needs = ((self._roster.prefill, job.prompt_tokens), (self._roster.decode, job.total_tokens))
        for pool, tokens in needs:
            staying = pool.index.staying
            if staying and staying.most < tokens:
                field = "prompt" if job.prompt_tokens >= (pool.capacity_tokens or 0) else "sampling.max_tokens"
                what = "the prompt" if pool.stage == PREFILL else "the prompt with its answer"
                return PromptTooLong(
                    field,
                    f"{what} takes {tokens} tokens; the largest {STAGE_NAMES[pool.stage]} worker holds "
                    f"{pool.capacity_tokens}",
                )
        return None

    def _reject_too_large(self) -> Iterator[Rejection]:
        """Jobs may have come to want what is no longer there: those that were queued just now, which may have been on a
        worker when the largest left, and all when the largest has become smaller."""
        smaller = False
        for pool in (self._roster.prefill, self._roster.decode):
            staying = pool.index.staying
            largest = staying.most if staying else math.inf  # nobody there: whoever comes may be of any size
            smaller = smaller or largest < self._largest.get(pool.stage, math.inf)
            self._largest[pool.stage] = largest
        queued, self._queued = self._queued, []
        for job in [*self._decode_line, *self._prefill_line] if smaller else queued:
            waits = job.state in (JobState.WAITING, JobState.WANTS_PREFILL)
            if waits and (error := self._too_large(job)):
                yield self._reject(job, error)

    def _reject_absent(self, now: float) -> Iterator[Rejection]:
        for pool in (self._roster.prefill, self._roster.decode):
            if pool.index.present:
                self._absent_since.pop(pool.stage, None)
                continue
            absent = now - self._absent_since.setdefault(pool.stage, now)
            if absent < self._patience(pool):
                continue
            waiting = list(self._decode_line)
            if pool.stage == PREFILL:
                waiting += self._prefill_line
            for job in waiting:
                yield self._reject(
                    job, Unavailable(f"no {STAGE_NAMES[pool.stage]} worker has reported for {absent:.0f} s")
                )

    def _patience(self, pool: Pool) -> float:
        """Seconds for which jobs wait while ``pool`` has no worker."""
        if self._absent_after is not None:
            return self._absent_after
        return max(MIN_ABSENT_AFTER, STARTUP_MARGIN * pool.longest_startup)

    def _reject(self, job: Job, error: OverfillError) -> Rejection:
        self.finish(job)
        return Rejection(job, error)

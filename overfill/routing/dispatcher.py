"""Which request goes where, and which one waits: the *Waiting* rule. Plain bookkeeping, no I/O, no clock.

A request takes a decode worker first, which reserves blocks, and only then a prefill slot. It waits only
while no admissible combination of the two exists::

    NEW -> WAITING -> PLACED -> WANTS_PREFILL -> RUNNING -> FINISHED
              ^         |             ^             |
              +-refused-+             +-need_prefill+

Order: resumed work before new work, otherwise first come, first served. A request that does not fit now may
be overtaken by one that does, until it has waited ``reserve_after`` seconds.

Callers say what happened (``submit``, ``reserved``, ``refused`` ...) and then ask ``poll`` for what follows.
"""

from __future__ import annotations

import enum
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field

from overfill.errors import OverfillError, Overloaded, PromptTooLong, Unavailable
from overfill.routing.policy import Policy
from overfill.routing.pool import DECODE, PREFILL, Pool, Roster, Worker
from overfill.v1 import common_pb2, decode_pb2, registry_pb2

STAGE_NAMES = {PREFILL: "prefill", DECODE: "decode"}


class JobState(enum.Enum):
    NEW = "new"
    WAITING = "waiting for a decode worker"
    PLACED = "on a decode worker, which is reserving blocks"
    WANTS_PREFILL = "blocks reserved, waiting for a prefill slot"
    RUNNING = "on a decode worker, prefill assigned"
    FINISHED = "finished"


@dataclass(eq=False, slots=True)
class Job:
    """One request as the dispatcher sees it. Only the dispatcher changes it, ``emitted`` apart.

    Attributes:
        id: of the request, for messages.
        prompt_tokens, max_tokens: tokens of the prompt, and most tokens of the answer.
        resumed: whether work was done on it before; then it goes before new work.
        emitted: tokens of the answer so far.
        waiting_since: when it last began to wait for a decode worker, seconds.
        decode, prefill: the workers on which it counts now.
        avoid: workers that failed it; tried again only when there is no other.
    """

    id: str
    prompt_tokens: int
    max_tokens: int
    resumed: bool = False
    emitted: int = 0
    state: JobState = JobState.NEW
    waiting_since: float = 0.0
    decode: Worker | None = None
    prefill: Worker | None = None
    avoid: set[tuple[str, int]] = field(default_factory=set)

    @property
    def total_tokens(self) -> int:
        """What the sequence takes when it is as long as it may get."""
        return self.prompt_tokens + self.max_tokens

    @property
    def reserve_tokens(self) -> int:
        """What a decode worker reserves before it starts."""
        return self.prompt_tokens + self.emitted + 1


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
        policy: picks one of several admissible workers.
        max_queue: most jobs waiting for a decode worker before new ones are refused.
        reserve_after: seconds after which the oldest blocked job reserves capacity: none after it in the
            order is placed on a decode worker that could hold it.
        absent_after: seconds without any worker of a stage after which jobs that need one are rejected.
    """

    def __init__(
        self,
        roster: Roster,
        policy: Policy,
        *,
        max_queue: int = 1024,
        reserve_after: float = 5.0,
        absent_after: float = 10.0,
    ) -> None:
        self._roster = roster
        self._policy = policy
        self._max_queue = max_queue
        self._reserve_after = reserve_after
        self._absent_after = absent_after
        self._jobs: set[Job] = set()
        self._reserving: set[Job] = set()
        self._decode_line = _Line()
        self._prefill_line = _Line()
        self._last_present: dict[common_pb2.Stage, float] = {}

    @property
    def num_waiting(self) -> int:
        """Jobs waiting for a worker of either stage."""
        return len(self._decode_line) + len(self._prefill_line)

    def waiting(self) -> Iterator[Job]:
        """Those jobs."""
        yield from self._decode_line
        yield from self._prefill_line

    @property
    def num_jobs(self) -> int:
        """Jobs that are not finished."""
        return len(self._jobs)

    def submit(self, job: Job, now: float) -> None:
        """Takes a new job in.

        Raises:
            PromptTooLong: no worker here could ever hold it.
            Overloaded: the queue is full, and the job is a new one.
        """
        if error := self._too_large(job):
            raise error
        # An answer that another router has begun is not to end here because of a full queue.
        if not job.resumed and len(self._decode_line) >= self._max_queue:
            raise Overloaded(f"{len(self._decode_line)} requests are waiting, which is the most this router queues")
        self._jobs.add(job)
        self._wait(job, now)

    def reserved(self, job: Job) -> None:
        """The decode worker has reserved blocks: the job wants a prefill slot now."""
        self._reserving.discard(job)
        job.state = JobState.WANTS_PREFILL
        self._prefill_line.append(job)

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

    def lost(self, job: Job, now: float, *, gone: bool) -> None:
        """The decode worker failed the job: it resumes elsewhere.

        Args:
            gone: the worker could not be reached or vanished, so nothing goes there until it reports again.
        """
        if job.decode is not None:
            job.avoid.add(job.decode.key)
            job.decode.closed = job.decode.closed or gone
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
            tried.closed = tried.closed or closed
        self.prefill_done(job)
        job.resumed = True
        job.state = JobState.WANTS_PREFILL
        self._prefill_line.append(job)

    def prefill_done(self, job: Job) -> None:
        """Gives the prefill slot back, if the job holds one."""
        if job.prefill is not None:
            self._roster.prefill.release(job.prefill)
            job.prefill = None

    def finish(self, job: Job) -> None:
        """Forgets the job and frees what it holds, in any state, any number of times."""
        self._detach(job)
        job.state = JobState.FINISHED
        self._jobs.discard(job)

    def report(self, worker: Worker, report: registry_pb2.Report, now: float) -> None:
        """Takes a worker's report."""
        self._roster.pool(worker.info.stage).report(worker, report, now)

    def poll(self, now: float) -> list[Placement | Rejection]:
        """Makes every placement that is possible now and rejects what waits in vain."""
        return [*self._reject_absent(now), *self._place_prefill(now), *self._place_decode(now)]

    def check(self, now: float) -> None:
        """Raises AssertionError unless the books balance and nobody waits in vain. Call after ``poll``."""
        for pool, attribute in ((self._roster.decode, "decode"), (self._roster.prefill, "prefill")):
            held: dict[Worker, int] = {}
            for job in self._jobs:
                if (worker := getattr(job, attribute)) is not None:
                    held[worker] = held.get(worker, 0) + 1
            for worker in {*pool, *held}:
                _require(worker.in_flight == held.get(worker, 0), f"{worker.id} counts {worker.in_flight}")
        for job in self._jobs:
            _require(job.state is not JobState.FINISHED, f"{job.id} is finished and kept")
            _require((job in self._decode_line) == (job.state is JobState.WAITING), f"{job.id}: decode line")
            _require(
                (job in self._prefill_line) == (job.state is JobState.WANTS_PREFILL),
                f"{job.id}: prefill line",
            )
            _require((job.decode is None) == (job.state in (JobState.NEW, JobState.WAITING)), f"{job.id}: decode")
            _require(job.prefill is None or job.state is JobState.RUNNING, f"{job.id}: prefill")
        _require({*self._decode_line, *self._prefill_line} <= self._jobs, "a finished job waits")
        for job in self._prefill_line:
            _require(not self._prefill_choices(job, now), f"{job.id} waits for a prefill slot that there is")
        _require(self._reserving == {j for j in self._jobs if j.state is JobState.PLACED}, "reserving jobs")
        holder: Job | None = None
        for job in self._decode_line:
            choices = self._combination(job, now)
            if holder is not None:
                choices = [w for w in choices if not w.could_hold(holder.total_tokens)]
            elif now - job.waiting_since >= self._reserve_after:
                holder = job
            _require(not choices, f"{job.id} waits for a decode worker that there is")

    def _wait(self, job: Job, now: float) -> None:
        job.state = JobState.WAITING
        job.waiting_since = now
        self._decode_line.append(job)

    def _detach(self, job: Job) -> None:
        """Takes the job out of every line and off every worker."""
        self._reserving.discard(job)
        self._decode_line.discard(job)
        self._prefill_line.discard(job)
        self.prefill_done(job)
        if job.decode is not None:
            self._roster.decode.release(job.decode)
            job.decode = None

    def _place_prefill(self, now: float) -> Iterator[Placement]:
        for job in list(self._prefill_line):
            choices = self._prefill_choices(job, now)
            if not choices:
                continue
            job.prefill = self._policy.choose(choices, job.prompt_tokens)
            self._roster.prefill.place(job.prefill, job.prompt_tokens)
            self._prefill_line.discard(job)
            job.state = JobState.RUNNING
            yield Placement(job, job.prefill)

    def _place_decode(self, now: float) -> Iterator[Placement | Rejection]:
        holder: Job | None = None  # the blocked job that reserves capacity
        for job in list(self._decode_line):
            if not any(w.admissible(now) for w in self._roster.decode) or not self._prefill_free(now):
                # Nobody can be placed, but the first in line may have come to want what is no longer there.
                if error := self._too_large(job):
                    yield self._reject(job, error)
                    continue
                return
            choices = self._combination(job, now)
            if holder is not None:
                choices = [w for w in choices if not w.could_hold(holder.total_tokens)]
            if choices:
                job.decode = self._policy.choose(choices, job.reserve_tokens)
                self._roster.decode.place(job.decode, job.reserve_tokens)
                self._decode_line.discard(job)
                self._reserving.add(job)
                job.state = JobState.PLACED
                yield Placement(job, job.decode)
            elif error := self._too_large(job):
                yield self._reject(job, error)
            elif holder is None and now - job.waiting_since >= self._reserve_after:
                holder = job

    def _combination(self, job: Job, now: float) -> list[Worker]:
        """Decode workers that may take ``job`` now; none while no prefill slot would be there for it."""
        if not self._prefill_free(now) or not self._prefill_choices(job, now):
            return []
        decode = self._usable(self._roster.decode, job, job.total_tokens, now)
        return [w for w in decode if w.admissible(now) and w.has_room(job.reserve_tokens)]

    def _prefill_choices(self, job: Job, now: float) -> list[Worker]:
        return [w for w in self._usable(self._roster.prefill, job, job.prompt_tokens, now) if w.admissible(now)]

    def _prefill_free(self, now: float) -> bool:
        """Whether a prefill slot is left beyond those that jobs on decode workers are about to take."""
        free = sum(w.credits_left for w in self._roster.prefill if w.admissible(now))
        return free > len(self._reserving) + len(self._prefill_line)

    def _usable(self, pool: Pool, job: Job, tokens: int, now: float) -> list[Worker]:
        """Workers large enough; those that failed the job only when none of the others is alive."""
        large = [w for w in pool if w.could_hold(tokens)]
        others = [w for w in large if w.key not in job.avoid and w.alive(now)]
        return others or large

    def _too_large(self, job: Job) -> PromptTooLong | None:
        needs = ((self._roster.prefill, job.prompt_tokens), (self._roster.decode, job.total_tokens))
        for pool, tokens in needs:
            staying = [w for w in pool if w.staying]
            if staying and not any(w.could_hold(tokens) for w in staying):
                field = "prompt" if job.prompt_tokens >= (pool.capacity_tokens or 0) else "sampling.max_tokens"
                what = "the prompt" if pool.stage == PREFILL else "the prompt with its answer"
                return PromptTooLong(
                    field,
                    f"{what} takes {tokens} tokens; the largest {STAGE_NAMES[pool.stage]} worker holds "
                    f"{pool.capacity_tokens}",
                )
        return None

    def _reject_absent(self, now: float) -> Iterator[Rejection]:
        for pool in (self._roster.prefill, self._roster.decode):
            if any(w.staying for w in pool):
                self._last_present[pool.stage] = now
                continue
            absent = now - self._last_present.setdefault(pool.stage, now)
            if absent < self._absent_after:
                continue
            waiting = list(self._decode_line)
            if pool.stage == PREFILL:
                waiting += self._prefill_line
            for job in waiting:
                yield self._reject(
                    job, Unavailable(f"no {STAGE_NAMES[pool.stage]} worker has been here for {absent:.0f} s")
                )

    def _reject(self, job: Job, error: OverfillError) -> Rejection:
        self.finish(job)
        return Rejection(job, error)


class _Line:
    """A queue in which resumed jobs go before new ones."""

    def __init__(self) -> None:
        self._resumed: OrderedDict[Job, None] = OrderedDict()
        self._new: OrderedDict[Job, None] = OrderedDict()

    def __iter__(self) -> Iterator[Job]:
        yield from self._resumed
        yield from self._new

    def __len__(self) -> int:
        return len(self._resumed) + len(self._new)

    def __contains__(self, job: object) -> bool:
        return job in self._resumed or job in self._new

    def append(self, job: Job) -> None:
        (self._resumed if job.resumed else self._new)[job] = None

    def push_front(self, job: Job) -> None:
        self.append(job)
        (self._resumed if job.resumed else self._new).move_to_end(job, last=False)

    def discard(self, job: Job) -> None:
        self._resumed.pop(job, None)
        self._new.pop(job, None)


def _require(holds: bool, what: str) -> None:
    if not holds:
        raise AssertionError(what)

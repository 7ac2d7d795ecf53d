"""Watches for the answers of decode workers to placed jobs. Plain bookkeeping, no I/O, no clock."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import takewhile

from overfill.routing.job import Job
from overfill.routing.worker import Worker

RESERVE_TIMEOUT = 0.5
"""Seconds after its placement from which a job that has no blocks yet keeps no prefill slot from other jobs."""

SILENT_AFTER = 3.0
"""Seconds after a placement from which a decode worker that has answered nothing since counts as silent."""

SILENCE = 10.0
"""Seconds for which nothing is placed on a silent worker, unless it answers. Then the dispatcher tries it again: its
unanswered jobs may have been cancelled meanwhile."""


class Reservations:
    """The placed jobs whose decode workers have neither reserved blocks nor refused, and the silent decode workers.

    A job is overdue from ``RESERVE_TIMEOUT`` after its placement on. A worker is silent if it has answered nothing for
    ``SILENT_AFTER`` after a placement. Times are seconds on the caller's clock.

    Attributes:
        num_expired: number of jobs that have become overdue so far.
    """

    def __init__(self) -> None:
        # Jobs with the worker's ``answers`` before it had the job, oldest placement first: those before
        # RESERVE_TIMEOUT, and those from then until SILENT_AFTER.
        self._on_time: dict[Job, int] = {}
        self._overdue: dict[Job, int] = {}
        self._silent: dict[Worker, float] = {}  # time until which nothing is placed on the worker
        self.num_expired = 0

    @property
    def on_time(self) -> frozenset[Job]:
        """Jobs that are not overdue."""
        return frozenset(self._on_time)

    @property
    def overdue(self) -> frozenset[Job]:
        """Overdue jobs that may still show that their worker is silent."""
        return frozenset(self._overdue)

    def add(self, job: Job, worker: Worker) -> None:
        """Waits for the answer of ``worker``, on which the job is placed now, at ``job.placed_at``."""
        self._on_time[job] = worker.answers

    def answered(self, job: Job) -> None:
        """Notes that the job's decode worker has reserved its blocks or refused it. The worker is not silent."""
        self.forget(job)
        if job.decode is not None:
            job.decode.answers += 1
            self._silent.pop(job.decode, None)

    def forget(self, job: Job) -> None:
        """Waits for the job's answer no longer. The job need not be known."""
        self._on_time.pop(job, None)
        self._overdue.pop(job, None)

    def expire(self, now: float) -> list[Job]:
        """Returns the jobs that have become overdue since the last call."""
        expired = _first_placed(self._on_time, RESERVE_TIMEOUT, now)
        for job in expired:
            self._overdue[job] = self._on_time.pop(job)
        self.num_expired += len(expired)
        return expired

    def silent(self, now: float) -> list[Worker]:
        """Returns the decode workers on which nothing may be placed now. Call ``expire`` before."""
        for job in _first_placed(self._overdue, SILENT_AFTER, now):
            answers = self._overdue.pop(job)
            # A worker with both stages answers after its step, which may be a long chunk of a prompt.
            may_be_late = job.compiles or (job.decode is not None and job.decode.info.colocated)
            if job.decode is not None and job.decode.answers == answers and not may_be_late:
                self._silent[job.decode] = now + SILENCE
        self._silent = {worker: until for worker, until in self._silent.items() if now < until}
        return list(self._silent)


def _first_placed(jobs: Iterable[Job], seconds: float, now: float) -> list[Job]:
    """Returns the first ``jobs``, which are ordered by placement: those placed at least ``seconds`` ago."""
    return list(takewhile(lambda job: job.placed_at is not None and now - job.placed_at >= seconds, jobs))

"""The workers on which clients' sessions were last, and the decode policy that returns to them. No I/O, no clock."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator

from overfill.routing.job import Job
from overfill.routing.policy import LeastLoad
from overfill.routing.worker import Worker

MAX_SESSIONS = 1 << 14
"""Maximum number of sessions whose latest worker is kept, per pool."""

_MAX_LOAD = 1.25
"""Ratio of requests to those of the least loaded worker, up to which a session stays where it was.

It is the balance of consistent hashing with bounded loads (Mirrokni, Thorup and Zadimoghaddam, 2018).
"""


class LatestWorkers:
    """The worker of one pool that each session used last. When there are too many, it forgets the oldest use."""

    def __init__(self) -> None:
        self._workers: OrderedDict[tuple[str, str], Worker] = OrderedDict()

    def __len__(self) -> int:
        return len(self._workers)

    def of(self, job: Job) -> Worker | None:
        """Returns the latest worker of the job's session, admissible or not; None if it is unknown."""
        return self._workers.get((job.key, job.session)) if job.session else None

    def placed(self, job: Job, worker: Worker) -> None:
        """Records a placement."""
        if job.session:
            session = job.key, job.session
            self._workers[session] = worker
            self._workers.move_to_end(session)
            if len(self._workers) > MAX_SESSIONS:
                self._workers.popitem(last=False)

    def left(self, worker: Worker) -> None:
        """Forgets a worker that has left the pool."""
        for session in [session for session, latest in self._workers.items() if latest is worker]:
            del self._workers[session]


class SessionAffinity(LeastLoad):
    """Prefers the worker that the session used last, and otherwise the least loaded one.

    A decode worker keeps the KV of prompts that it has received, so the next turn transfers only what is new. Each
    sequence in a batch makes its steps slower. So the session moves when its worker has more than 1.25 times the
    requests of the least loaded worker, plus one, or has more prompt tokens queued.
    """

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed)
        self._latest = LatestWorkers()

    def best(self, job: Job) -> Iterator[Worker]:
        latest = self._latest.of(job)
        stays = latest is not None and latest in self._places and self._costs_little(latest)
        if stays and latest is not None:
            yield latest
        yield from (worker for worker in super().best(job) if not (stays and worker is latest))

    def placed(self, job: Job, worker: Worker) -> int:
        self._latest.placed(job, worker)
        return super().placed(job, worker)

    def left(self, worker: Worker) -> None:
        self._latest.left(worker)

    def _costs_little(self, worker: Worker) -> bool:
        least = self._order[0][2]
        return worker.queued_tokens <= least.queued_tokens and worker.requests <= 1 + _MAX_LOAD * least.requests

"""The workers on which clients' sessions and shared prompts were last, and the decode policy that returns to them.

No I/O, no clock.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator

from overfill.routing.job import Job
from overfill.routing.policy import LeastLoad
from overfill.routing.worker import Worker

MAX_SESSIONS = 1 << 14
"""Maximum number of sessions whose latest worker is kept, per pool. As many shared prompts are kept."""

_MAX_LOAD = 1.25
"""Ratio of requests to those of the least loaded worker, up to which a session stays where it was.

It is the balance of consistent hashing with bounded loads (Mirrokni, Thorup and Zadimoghaddam, 2018).
"""

_SHARED_PROMPT_SLACK = 8
"""Number of requests beyond that ratio that a prompt's worker may have and still get the prompt's next task.

Each task there saves a transfer of the prompt's KV.
"""


def _session(job: Job) -> Hashable:
    return (job.key, job.session) if job.session else None


def _shared_prompt(job: Job) -> Hashable:
    return None if job.shared_prompt is None else (job.key, job.shared_prompt)


class LatestWorkers:
    """The worker of one pool that each session or shared prompt used last; of too many, it forgets the oldest use.

    Args:
        key: returns a job's session or shared prompt; None if it has none.
    """

    def __init__(self, key: Callable[[Job], Hashable] = _session) -> None:
        self._key = key
        self._workers: OrderedDict[Hashable, Worker] = OrderedDict()

    def __len__(self) -> int:
        return len(self._workers)

    def of(self, job: Job) -> Worker | None:
        """Returns the latest worker of the job's key, admissible or not; None if it is unknown."""
        return None if (key := self._key(job)) is None else self._workers.get(key)

    def placed(self, job: Job, worker: Worker) -> None:
        """Records a placement."""
        if (key := self._key(job)) is not None:
            self._workers[key] = worker
            self._workers.move_to_end(key)
            if len(self._workers) > MAX_SESSIONS:
                self._workers.popitem(last=False)

    def left(self, worker: Worker) -> None:
        """Forgets a worker that has left the pool."""
        for key in [key for key, latest in self._workers.items() if latest is worker]:
            del self._workers[key]


class SessionAffinity(LeastLoad):
    """Prefers the worker that the session used last, and otherwise the least loaded one.

    A decode worker keeps the KV of prompts that it has received, so the next turn transfers only what is new. Each
    sequence in a batch makes its steps slower. So the session moves when its worker has more than 1.25 times the
    requests of the least loaded worker, plus one, or has more prompt tokens queued.

    Tasks of one prompt go to one worker too, because they share its KV there. They go elsewhere when it has more than
    1.25 times the requests of the least loaded worker, plus eight.
    """

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed)
        self._latest = LatestWorkers()
        self._latest_of_prompt = LatestWorkers(_shared_prompt)

    def best(self, job: Job) -> Iterator[Worker]:
        stays: list[Worker] = []
        for latest, more in ((self._latest_of_prompt.of(job), _SHARED_PROMPT_SLACK), (self._latest.of(job), 1)):
            if latest is not None and latest in self._places and self._costs_little(latest, job, more):
                stays.append(latest)
        yield from dict.fromkeys(stays)
        yield from (worker for worker in super().best(job) if worker not in stays)

    def placed(self, job: Job, worker: Worker) -> None:
        self._latest.placed(job, worker)
        self._latest_of_prompt.placed(job, worker)

    def left(self, worker: Worker) -> None:
        self._latest.left(worker)
        self._latest_of_prompt.left(worker)

    def _costs_little(self, worker: Worker, job: Job, more: int) -> bool:
        least = next((other for _, _, other in self._order if other.has(job.adapter)), worker)
        return worker.queued_tokens <= least.queued_tokens and worker.requests <= more + _MAX_LOAD * least.requests

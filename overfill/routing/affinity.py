"""Prefix affinity: places a prompt where most of it is cached, unless the queue there costs more than that saves."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

from overfill.routing.job import Job
from overfill.routing.policy import LeastLoad
from overfill.routing.prefix_index import PrefixIndex
from overfill.routing.sessions import LatestWorkers
from overfill.routing.worker import Worker

SESSION_TOKENS = 512
"""Tokens by which the worker that a session used last may have more ahead than another, and still goes before it."""

NUM_LEAST_LOADED = 4
"""Number of least loaded workers that are compared as well, cached prefix or not."""


class PrefixAffinity(LeastLoad):
    """Orders workers by the tokens to compute first: those queued on the worker, and those that the prompt costs there.

    The prompt costs what is in no cache, and a part of what the worker can import (``PrefixIndex.costs``). So a worker
    does not get the prompt if its queue exceeds the least loaded worker's by more than its cache saves. Where another
    worker can borrow the KV, the cache saves less, and prompts with a common beginning spread. Among workers that are
    about equal, the session's latest one goes first.
    """

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed)
        self._latest = LatestWorkers()
        self._prefixes = PrefixIndex()

    def use_prefixes(self, prefixes: PrefixIndex) -> None:
        self._prefixes = prefixes

    def best(self, job: Job) -> Iterator[Worker]:
        preferred: list[Worker] = []
        if len(self._places) > 1:  # a single worker needs no comparison
            choices, latest = self._prefixes.nearest(job, self._places), self._latest.of(job)
            if latest in self._places:
                choices[latest] = None
            if choices:
                choices |= dict.fromkeys(islice(super().best(job), NUM_LEAST_LOADED))
                ahead = {
                    worker: worker.queued_tokens + cost for worker, cost in self._prefixes.costs(job, choices).items()
                }
                if latest in ahead:
                    ahead[latest] -= SESSION_TOKENS
                preferred = sorted(ahead, key=lambda worker: (ahead[worker], self.rank(worker), worker.id))
        yield from preferred
        yield from (worker for worker in super().best(job) if worker not in preferred)

    def placed(self, job: Job, worker: Worker) -> None:
        self._latest.placed(job, worker)

    def left(self, worker: Worker) -> None:
        self._latest.left(worker)

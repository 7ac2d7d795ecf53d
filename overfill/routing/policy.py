"""Placement policies: the order in which the dispatcher tries a pool's admissible workers.

A policy keeps the admissible workers in an order (``put``, ``drop``) and yields the best first (``best``). The
dispatcher places the request on the first that can hold it. Orders are sorted lists with binary search, so a placement
costs about the same with ten workers and with a thousand.
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from bisect import bisect_left, insort
from collections.abc import Iterator, Mapping
from typing import Any

from overfill.routing.job import Job
from overfill.routing.prefix_index import PrefixIndex
from overfill.routing.worker import Worker


class Policy(ABC):
    """The order of one pool's workers. ``seed`` is for random choices."""

    def __init__(self, seed: int = 0) -> None:
        self._random = random.Random(seed)

    @abstractmethod
    def put(self, worker: Worker) -> None:
        """Adds an admissible worker. The pool calls it again whenever the worker has changed."""

    @abstractmethod
    def drop(self, worker: Worker) -> None:
        """Removes a worker that is no longer admissible."""

    @abstractmethod
    def best(self, job: Job) -> Iterator[Worker]:
        """Yields each admissible worker once, the best for ``job`` first. Do not change the policy meanwhile."""

    def use_prefixes(self, prefixes: PrefixIndex) -> None:
        """Takes the KV that the workers have. The pool calls it before it adds workers. The default ignores it."""
        return

    def set_short_prompts(self, tokens: Mapping[str, float]) -> None:
        """Takes the length of a short prompt for each tier, in uncached tokens. The default ignores it.

        A worker with both stages computes a few short prompts between two decode steps and still meets the tier's
        objective for the time between tokens (``Scaler.short_prompt``).
        """
        return

    def placed(self, job: Job, worker: Worker) -> None:
        """Records a placement. The default ignores it."""
        return

    def left(self, worker: Worker) -> None:
        """Records that ``worker`` has left the pool. The default ignores it."""
        return


class Ranked(Policy):
    """Orders workers by rank, the smallest first."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed)
        self._order: list[tuple[Any, str, Worker]] = []
        self._places: dict[Worker, tuple[Any, str, Worker]] = {}

    @staticmethod
    @abstractmethod
    def rank(worker: Worker) -> Any:
        """Returns the rank. Workers of equal rank are ordered by id."""

    def put(self, worker: Worker) -> None:
        place = (self.rank(worker), worker.id, worker)
        old = self._places.get(worker)
        if old == place:
            return
        if old is not None:
            del self._order[bisect_left(self._order, old)]
        self._places[worker] = place
        insort(self._order, place)

    def drop(self, worker: Worker) -> None:
        del self._order[bisect_left(self._order, self._places.pop(worker))]

    def best(self, job: Job) -> Iterator[Worker]:
        return (worker for _, _, worker in self._order)


class LeastLoad(Ranked):
    """Prefers the worker with the fewest queued prompt tokens, then the fewest requests, then the oldest placement."""

    @staticmethod
    def rank(worker: Worker) -> Any:
        return worker.queued_tokens, worker.requests, worker.last_placed


class MostFreeKv(Ranked):
    """Prefers the worker with room for the most tokens; equal workers are ordered by least load."""

    @staticmethod
    def rank(worker: Worker) -> Any:
        return -worker.room_tokens, worker.queued_tokens, worker.requests, worker.last_placed


class RoundRobin(Ranked):
    """Prefers the worker with the oldest placement."""

    @staticmethod
    def rank(worker: Worker) -> Any:
        return worker.last_placed


class PowerOfTwo(Policy):
    """Prefers the less loaded of two random workers, so that routers with the same reports choose differently."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed)
        self._workers: list[Worker] = []
        self._places: dict[Worker, int] = {}

    def put(self, worker: Worker) -> None:
        if worker not in self._places:
            self._places[worker] = len(self._workers)
            self._workers.append(worker)

    def drop(self, worker: Worker) -> None:
        place, last = self._places.pop(worker), self._workers.pop()
        if last is not worker:
            self._workers[place] = last
            self._places[last] = place

    def best(self, job: Job) -> Iterator[Worker]:
        count = len(self._workers)
        if count > 1:
            first, second = self._random.randrange(count), self._random.randrange(count - 1)
            pair = [self._workers[first], self._workers[second + (second >= first)]]
            pair.sort(key=LeastLoad.rank)
            yield from pair
            yield from (worker for worker in self._workers if worker not in pair)
        else:
            yield from self._workers

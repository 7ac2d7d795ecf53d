"""Which of a pool's admissible workers takes a request. Admission itself is the dispatcher's.

A policy keeps the admissible workers in an order of its own (``put``, ``drop``) and says who comes first (``best``);
the dispatcher takes the first that can hold the request. So a decision costs the same in a pool of ten and of a
thousand: orders are sorted lists, searched by halves, in which a change moves some pointers.
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from bisect import bisect_left, insort
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

from overfill.routing.worker import Worker


class Request(Protocol):
    """What a policy may know of a request."""

    @property
    def prompt_tokens(self) -> int: ...

    @property
    def block_keys(self) -> Callable[[int], Iterator[int]] | None:
        """Keys of the prompt's full blocks for a block size (``kv.keys``); None when they are not known."""


class Policy(ABC):
    """One pool's order of workers. ``seed`` decides what is left to chance."""

    def __init__(self, seed: int = 0) -> None:
        self._random = random.Random(seed)

    @abstractmethod
    def put(self, worker: Worker) -> None:
        """``worker`` is admissible; called again whenever something about it has changed."""

    @abstractmethod
    def drop(self, worker: Worker) -> None:
        """``worker`` is not admissible any more."""

    @abstractmethod
    def best(self, request: Request) -> Iterator[Worker]:
        """All admissible workers, each once, the best for ``request`` first. Nothing may change meanwhile."""

    @abstractmethod
    def check(self, workers: Sequence[Worker]) -> None:
        """Raises AssertionError unless exactly ``workers`` are in the order, where they belong."""

    def keys_changed(self, worker: Worker, added: Iterable[int], removed: Iterable[int]) -> None:
        """The prefix cache of ``worker`` has other keys now. Most do not care."""
        return

    def placed(self, request: Request, worker: Worker) -> int:
        """``request`` goes to ``worker``; tokens of its prompt that are likely to be in the prefix cache there."""
        return 0


class Ranked(Policy):
    """Workers by a key; the smallest first."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed)
        self._order: list[tuple[Any, str, Worker]] = []
        self._places: dict[Worker, tuple[Any, str, Worker]] = {}

    @staticmethod
    @abstractmethod
    def key(worker: Worker) -> Any:
        """Comparable; of equals the smaller id comes first."""

    def put(self, worker: Worker) -> None:
        place = (self.key(worker), worker.id, worker)
        old = self._places.get(worker)
        if old == place:
            return
        if old is not None:
            del self._order[bisect_left(self._order, old)]
        self._places[worker] = place
        insort(self._order, place)

    def drop(self, worker: Worker) -> None:
        del self._order[bisect_left(self._order, self._places.pop(worker))]

    def best(self, request: Request) -> Iterator[Worker]:
        return (worker for _, _, worker in self._order)

    def check(self, workers: Sequence[Worker]) -> None:
        if self._order != sorted((self.key(w), w.id, w) for w in workers):
            raise AssertionError(f"{type(self).__name__}: the order is not that of the workers")


class LeastLoad(Ranked):
    """Fewest queued prompt tokens, then fewest requests; among equals the least recently used."""

    @staticmethod
    def key(worker: Worker) -> Any:
        return worker.queued_tokens, worker.requests, worker.last_placed


class MostFreeKv(Ranked):
    """Most tokens that still fit, then as least load."""

    @staticmethod
    def key(worker: Worker) -> Any:
        return -worker.room_tokens, worker.queued_tokens, worker.requests, worker.last_placed


class RoundRobin(Ranked):
    """The worker whose latest placement is longest ago."""

    @staticmethod
    def key(worker: Worker) -> Any:
        return worker.last_placed


class PowerOfTwo(Policy):
    """The less loaded of two workers drawn at random: routers that know the same do not all choose the same."""

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

    def best(self, request: Request) -> Iterator[Worker]:
        count = len(self._workers)
        if count > 1:
            first, second = self._random.randrange(count), self._random.randrange(count - 1)
            pair = [self._workers[first], self._workers[second + (second >= first)]]
            pair.sort(key=LeastLoad.key)
            yield from pair
            yield from (worker for worker in self._workers if worker not in pair)
        else:
            yield from self._workers

    def check(self, workers: Sequence[Worker]) -> None:
        if set(self._workers) != set(workers) or len(self._places) != len(self._workers):
            raise AssertionError("two choices: the workers are not the admissible ones")

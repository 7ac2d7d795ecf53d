"""Totals over a pool's workers, kept up to date so that no placement has to look at every worker.

The pool calls ``refresh`` after every change to a worker, and ``expire`` before every read, because a worker can fall
silent without any event. ``pool_invariant`` compares the totals with the workers one by one.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections import OrderedDict
from collections.abc import Iterator
from typing import NamedTuple

from overfill.routing.policy import Policy
from overfill.routing.worker import STALE_AFTER, Worker


class Capacities:
    """Counts workers by the longest sequence that they can hold, in tokens. An unknown length counts as infinite."""

    def __init__(self) -> None:
        self._counts: dict[float, int] = {}

    def __bool__(self) -> bool:
        return bool(self._counts)

    def change(self, capacity: float, by: int) -> None:
        count = self._counts.get(capacity, 0) + by
        if count:
            self._counts[capacity] = count
        else:
            del self._counts[capacity]

    def holding(self, tokens: int) -> int:
        """Returns the number of workers that can hold a sequence of ``tokens``."""
        return sum(count for capacity, count in self._counts.items() if capacity >= tokens)

    @property
    def total(self) -> int:
        """Number of workers counted."""
        return sum(self._counts.values())

    @property
    def largest(self) -> float:
        """Largest capacity in tokens; 0 without workers."""
        return max(self._counts, default=0.0)

    @property
    def smallest(self) -> float:
        return min(self._counts, default=0.0)

    @property
    def known(self) -> list[float]:
        return [capacity for capacity in self._counts if capacity != math.inf]


class _Entry(NamedTuple):
    """The values with which a worker is counted now."""

    capacity: float
    not_draining: bool
    present: bool
    alive: bool
    credits: int  # 0: not admissible
    room: float


class Index:
    """Totals over the workers of a pool, and their order by free room and by policy.

    Attributes:
        not_draining, alive, admissible: capacities of the workers in that state.
        present: number of workers that are alive or still starting; see ``Worker.starting``.
        free_credits: number of requests that the router may still place on all admissible workers together.
        changes: grows with each change of which workers have joined and do not drain, or of their capacity.
    """

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.not_draining, self.alive, self.admissible = Capacities(), Capacities(), Capacities()
        self.present = 0
        self.free_credits = 0
        self.changes = 0
        self._entries: dict[Worker, _Entry] = {}
        self._rooms: list[tuple[float, str, Worker]] = []
        self._reports: OrderedDict[Worker, float] = OrderedDict()  # ready workers, ordered by the time of their report

    @property
    def max_room(self) -> float:
        """Number of tokens that fit on the emptiest admissible worker; -1 without one."""
        return self._rooms[-1][0] if self._rooms else -1.0

    def is_alive(self, worker: Worker) -> bool:
        entry = self._entries.get(worker)
        return entry is not None and entry.alive

    def is_admissible(self, worker: Worker) -> bool:
        entry = self._entries.get(worker)
        return entry is not None and entry.credits > 0

    def by_room(self, tokens: int) -> Iterator[Worker]:
        """Yields the admissible workers with room for ``tokens``, the emptiest first."""
        for room, _, worker in reversed(self._rooms):
            if room < tokens:
                return
            yield worker

    def refresh(self, worker: Worker) -> None:
        """Updates the totals for ``worker``, which has joined. Leaves its silence to ``expire``."""
        self._set(worker, worker in self._reports and worker.alive(worker.reported_at))

    def reported(self, worker: Worker) -> None:
        """Updates the totals for ``worker`` after a report."""
        self._reports.pop(worker, None)
        if worker.ready:
            self._reports[worker] = worker.reported_at
        self.refresh(worker)

    def forget(self, worker: Worker) -> None:
        """Removes ``worker`` from the totals and the policy: it has left the pool."""
        self._reports.pop(worker, None)
        if (old := self._entries.pop(worker, None)) is not None:
            self.changes += 1
            self._count(worker, old, -1)
            if old.credits:
                self.policy.drop(worker)

    def expire(self, now: float) -> Iterator[Worker]:
        """Stops counting workers as alive that have been silent for more than ``STALE_AFTER``, and yields them."""
        while self._reports:
            worker, reported_at = next(iter(self._reports.items()))
            if now - reported_at <= STALE_AFTER:
                return
            del self._reports[worker]
            self._set(worker, False)
            yield worker

    def _set(self, worker: Worker, alive: bool) -> None:
        admissible = alive and not worker.paused_until_report
        credits = worker.credits_left if admissible else 0
        present = alive or worker.starting
        room = worker.room_tokens if credits else 0.0
        new = _Entry(capacity_of(worker), not worker.draining, present, alive, credits, room)
        old = self._entries.get(worker)
        self._entries[worker] = new
        if old is not None and old[:4] == new[:4] and old.credits and credits:
            # As with most placements and departures, only the load has changed.
            self.free_credits += credits - old.credits
            if room != old.room:
                del self._rooms[bisect_left(self._rooms, (old.room, worker.id, worker))]
                insort(self._rooms, (room, worker.id, worker))
        elif old != new:
            self.changes += old is None or old[:2] != new[:2]
            if old is not None:
                self._count(worker, old, -1)
            self._count(worker, new, 1)
        if credits:
            self.policy.put(worker)
        elif old is not None and old.credits:
            self.policy.drop(worker)

    def _count(self, worker: Worker, entry: _Entry, by: int) -> None:
        if entry.not_draining:
            self.not_draining.change(entry.capacity, by)
        self.present += by * entry.present
        if entry.alive:
            self.alive.change(entry.capacity, by)
        if not entry.credits:
            return
        self.admissible.change(entry.capacity, by)
        self.free_credits += by * entry.credits
        place = (entry.room, worker.id, worker)
        if by > 0:
            insort(self._rooms, place)
        else:
            del self._rooms[bisect_left(self._rooms, place)]


def capacity_of(worker: Worker) -> float:
    """Returns the longest sequence that the empty worker can hold, in tokens; infinite while unknown."""
    capacity = worker.capacity_tokens
    return math.inf if capacity is None else capacity

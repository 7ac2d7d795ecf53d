"""What a dispatcher asks of a pool over and over, kept up to date, so that no decision looks at every worker.

Every change to a worker is followed by ``refresh``, and every look by ``expire``, since workers that fall silent change
by themselves. ``check`` compares all of it with the workers, one by one.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from overfill.routing.policy import Policy
from overfill.routing.worker import STALE_AFTER, Worker


class Capacities:
    """Workers counted by the longest sequence that they hold; a pool has few different ones. Unknown is infinite."""

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
        """How many could hold ``tokens``."""
        return sum(count for capacity, count in self._counts.items() if capacity >= tokens)

    @property
    def total(self) -> int:
        """How many workers are counted."""
        return sum(self._counts.values())

    @property
    def largest(self) -> float:
        """0 when there is nobody."""
        return max(self._counts, default=0.0)

    @property
    def smallest(self) -> float:
        return min(self._counts, default=0.0)

    @property
    def known(self) -> list[float]:
        return [capacity for capacity in self._counts if capacity != math.inf]


class _Entry(NamedTuple):
    """What of a worker is counted now."""

    capacity: float
    not_draining: bool
    present: bool
    alive: bool
    credits: int  # 0: not admissible
    room: float


class Index:
    """Attributes:
    not_draining, alive, admissible: capacities of the workers of which that is true.
    present: number of workers that are alive or still start; see ``Worker.starting``.
    free_credits: what may still be placed, on all admissible workers together.
    """

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.not_draining, self.alive, self.admissible = Capacities(), Capacities(), Capacities()
        self.present = 0
        self.free_credits = 0
        self._entries: dict[Worker, _Entry] = {}
        self._rooms: list[tuple[float, str, Worker]] = []
        self._reports: OrderedDict[Worker, float] = OrderedDict()  # alive workers, the longest silent first

    @property
    def max_room(self) -> float:
        """Tokens that the emptiest admissible worker takes now; -1 without one."""
        return self._rooms[-1][0] if self._rooms else -1.0

    def is_alive(self, worker: Worker) -> bool:
        entry = self._entries.get(worker)
        return entry is not None and entry.alive

    def by_room(self, tokens: int) -> Iterator[Worker]:
        """Admissible workers with room for ``tokens``, the emptiest first."""
        for room, _, worker in reversed(self._rooms):
            if room < tokens:
                return
            yield worker

    def refresh(self, worker: Worker) -> None:
        """Counts ``worker``, a joined one, as it is now, but for the time since its last report."""
        self._set(worker, worker in self._reports and worker.alive(worker.reported_at))

    def reported(self, worker: Worker) -> None:
        """As ``refresh``, after a report."""
        self._reports.pop(worker, None)
        if worker.alive(worker.reported_at):
            self._reports[worker] = worker.reported_at
        self.refresh(worker)

    def forget(self, worker: Worker) -> None:
        """It is none of the pool's any more."""
        self._reports.pop(worker, None)
        if (old := self._entries.pop(worker, None)) is not None:
            self._count(worker, old, -1)
            if old.credits:
                self.policy.drop(worker)

    def expire(self, now: float) -> None:
        """Workers that have been silent for too long are not alive any more."""
        while self._reports:
            worker, reported_at = next(iter(self._reports.items()))
            if now - reported_at <= STALE_AFTER:
                return
            del self._reports[worker]
            self._set(worker, False)

    def check(self, workers: Iterable[Worker], now: float) -> None:
        """Raises AssertionError unless all of this is what the workers are. Call after ``expire``."""
        not_draining, alive, admissible = Capacities(), Capacities(), Capacities()
        present, free, rooms = 0, 0, []
        for worker in workers:
            present += worker.starting or worker.alive(now)
            capacity = _capacity(worker)
            if not worker.draining:
                not_draining.change(capacity, 1)
            if worker.alive(now):
                alive.change(capacity, 1)
            if worker.admissible(now):
                admissible.change(capacity, 1)
                free += worker.credits_left
                rooms.append((worker.room_tokens, worker.id, worker))
        for name, ours, theirs in (
            ("not_draining", self.not_draining, not_draining),
            ("alive", self.alive, alive),
            ("admissible", self.admissible, admissible),
        ):
            if ours._counts != theirs._counts:
                raise AssertionError(f"{name} workers: {ours._counts} counted, {theirs._counts} there")
        if self.present != present:
            raise AssertionError(f"{self.present} present workers counted, {present} there")
        if self.free_credits != free:
            raise AssertionError(f"{self.free_credits} credits counted, {free} there")
        if self._rooms != sorted(rooms):
            raise AssertionError("rooms are not those of the admissible workers")
        self.policy.check([worker for _, _, worker in rooms])

    def _set(self, worker: Worker, alive: bool) -> None:
        admissible = alive and not worker.paused_until_report
        credits = worker.credits_left if admissible else 0
        present = alive or worker.starting
        room = worker.room_tokens if credits else 0.0
        new = _Entry(_capacity(worker), not worker.draining, present, alive, credits, room)
        old = self._entries.get(worker)
        if old != new:
            if old is not None:
                self._count(worker, old, -1)
            self._entries[worker] = new
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


def _capacity(worker: Worker) -> float:
    capacity = worker.capacity_tokens
    return math.inf if capacity is None else capacity

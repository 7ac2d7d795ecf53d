"""Who goes first: resumed work before new work, then priority, then fair share among API keys, then arrival.

Fair share is start-time fair queueing (Goyal, Vin and Cheng, 1996): a job's tag is when its key would have come to it,
had all keys had equal shares of the tokens; the smallest tag goes first. A key that asks for much waits behind one that
asks for little, and nobody gains from having been away.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator
from typing import Any, Generic, Protocol, TypeVar

_MAX_KEYS = 1024  # shares that are remembered before those that no longer matter are looked for


class Queueable(Protocol):
    """What a line knows of a job."""

    migrated: bool
    priority: int
    key: str

    charged: int

    @property
    def reserve_tokens(self) -> int:
        """Tokens for which a worker must have room; the same for as long as the job is in the line."""

    @property
    def share_tokens(self) -> int:
        """Tokens that it takes of its key's share."""


J = TypeVar("J", bound=Queueable)


class VirtualClock:
    """What each key has had of one priority, in tokens."""

    def __init__(self) -> None:
        self._virtual_time = 0.0
        self._finish_tags: dict[str, float] = {}

    def start_tag(self, key: str, tokens: int) -> float:
        """Of a job that comes now."""
        if len(self._finish_tags) >= _MAX_KEYS:
            self._finish_tags = {key: end for key, end in self._finish_tags.items() if end > self._virtual_time}
        start = self.next_start_tag(key)
        self._finish_tags[key] = start + tokens
        return start

    def next_start_tag(self, key: str) -> float:
        """Tag of the key's next job, were it to come now."""
        return max(self._virtual_time, self._finish_tags.get(key, 0.0))

    def advance_virtual_time(self, tag: float) -> None:
        """The job of that tag has its turn."""
        self._virtual_time = max(self._virtual_time, tag)

    def refund(self, key: str, tokens: int) -> None:
        """The key did not use so many tokens that a job of its was to take."""
        if key in self._finish_tags:
            self._finish_tags[key] -= tokens


class FairQueue(Generic[J]):
    """Jobs that wait, in order.

    Args:
        fair: whether keys share; otherwise jobs of one priority go in order of arrival.
    """

    def __init__(self, *, fair: bool = True) -> None:
        self._fair = fair
        self._clocks: dict[int, VirtualClock] = {}
        self._order: list[tuple[Any, J]] = []
        self._positions: dict[J, tuple[Any, int]] = {}  # where it is, and how much room it needs
        self._sorted_needs: list[int] = []
        self._num_new: dict[int, int] = {}
        self._count = 0

    def __iter__(self) -> Iterator[J]:
        """In order. The job that was given out last may leave the line meanwhile."""
        index = 0
        while index < len(self._order):
            entry = self._order[index]
            yield entry[1]
            index += index < len(self._order) and self._order[index] is entry

    def __len__(self) -> int:
        return len(self._order)

    def __contains__(self, job: object) -> bool:
        return job in self._positions

    @property
    def smallest_need(self) -> int:
        """Room that the smallest job wants, in tokens; 0 when nobody waits."""
        return self._sorted_needs[0] if self._sorted_needs else 0

    def waiting(self, priority: int) -> int:
        """New jobs of that priority."""
        return self._num_new.get(priority, 0)

    def ahead(self, priority: int, key: str) -> int:
        """Jobs that would go before a new one."""
        tag = self._clocks[priority].next_start_tag(key) if priority in self._clocks else 0.0
        return bisect_left(self._order, (1, priority, 1, tag, self._count + 1), key=lambda entry: entry[0])

    def append(self, job: J) -> None:
        """Behind all that have the same claim."""
        self._count += 1
        tag = 0.0
        if self._fair and not job.migrated:
            job.charged = job.share_tokens
            tag = self._clocks.setdefault(job.priority, VirtualClock()).start_tag(job.key, job.charged)
        self._add(job, (not job.migrated, job.priority, 1, tag, self._count))

    def push_front(self, job: J) -> None:
        """Before all that have the same claim: it had its turn, and lost it through no fault of its own."""
        self._count += 1
        self._add(job, (not job.migrated, job.priority, 0, 0.0, -self._count))

    def take(self, job: J) -> None:
        """It has its turn."""
        _, priority, behind, tag, _ = self._positions[job][0]
        if self._fair and behind and not job.migrated:
            self._clocks[priority].advance_virtual_time(tag)
        self.discard(job)

    def discard(self, job: J) -> None:
        """It waits no longer, if it did."""
        if job not in self._positions:
            return
        place, need = self._positions.pop(job)
        del self._order[bisect_left(self._order, place, key=lambda entry: entry[0])]
        del self._sorted_needs[bisect_left(self._sorted_needs, need)]
        if place[0]:
            self._num_new[place[1]] -= 1

    def refund(self, job: J, tokens: int) -> None:
        """The job has ended and took so many tokens less of its key's share than was thought."""
        if self._fair and job.priority in self._clocks:
            self._clocks[job.priority].refund(job.key, tokens)

    def _add(self, job: J, place: Any) -> None:
        self._positions[job] = place, job.reserve_tokens
        insort(self._order, (place, job), key=lambda entry: entry[0])
        insort(self._sorted_needs, job.reserve_tokens)
        if not job.migrated:
            self._num_new[job.priority] = self._num_new.get(job.priority, 0) + 1

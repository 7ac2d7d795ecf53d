"""Who goes first: resumed work before new work, then priority, then fair share among API keys, then arrival.

Fair share is start-time fair queueing (Goyal, Vin and Cheng, 1996): a job's tag is when its key would have come to it,
had all keys had equal shares of the tokens; the smallest tag goes first. A key that asks for much waits behind one that
asks for little, and nobody gains from having been away.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator
from typing import Any, Generic, Protocol, TypeVar

_MOST_KEYS = 1024  # shares that are remembered before those that no longer matter are looked for


class Waiting(Protocol):
    """What a line knows of a job."""

    resumed: bool
    priority: int
    key: str

    charged: int

    @property
    def reserve_tokens(self) -> int:
        """Tokens for which a worker must have room; the same for as long as the job is in the line."""

    @property
    def share_tokens(self) -> int:
        """Tokens that it takes of its key's share."""


J = TypeVar("J", bound=Waiting)


class Shares:
    """What each key has had of one priority, in tokens."""

    def __init__(self) -> None:
        self._now = 0.0
        self._ends: dict[str, float] = {}

    def tag(self, key: str, tokens: int) -> float:
        """Of a job that comes now."""
        if len(self._ends) >= _MOST_KEYS:
            self._ends = {key: end for key, end in self._ends.items() if end > self._now}
        start = self.next(key)
        self._ends[key] = start + tokens
        return start

    def next(self, key: str) -> float:
        """Tag of the key's next job, were it to come now."""
        return max(self._now, self._ends.get(key, 0.0))

    def served(self, tag: float) -> None:
        """The job of that tag has its turn."""
        self._now = max(self._now, tag)

    def back(self, key: str, tokens: int) -> None:
        """The key did not use so many tokens that a job of its was to take."""
        if key in self._ends:
            self._ends[key] -= tokens


class Line(Generic[J]):
    """Jobs that wait, in order.

    Args:
        fair: whether keys share; otherwise jobs of one priority go in order of arrival.
    """

    def __init__(self, *, fair: bool = True) -> None:
        self._fair = fair
        self._shares: dict[int, Shares] = {}
        self._order: list[tuple[Any, J]] = []
        self._places: dict[J, tuple[Any, int]] = {}  # where it is, and how much room it needs
        self._needs: list[int] = []
        self._classes: dict[int, int] = {}
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
        return job in self._places

    @property
    def least_need(self) -> int:
        """Room that the smallest job wants, in tokens; 0 when nobody waits."""
        return self._needs[0] if self._needs else 0

    def waiting(self, priority: int) -> int:
        """New jobs of that priority."""
        return self._classes.get(priority, 0)

    def ahead(self, priority: int, key: str) -> int:
        """Jobs that would go before a new one."""
        tag = self._shares[priority].next(key) if priority in self._shares else 0.0
        return bisect_left(self._order, (1, priority, 1, tag, self._count + 1), key=lambda entry: entry[0])

    def append(self, job: J) -> None:
        """Behind all that have the same claim."""
        self._count += 1
        tag = 0.0
        if self._fair and not job.resumed:
            job.charged = job.share_tokens
            tag = self._shares.setdefault(job.priority, Shares()).tag(job.key, job.charged)
        self._add(job, (not job.resumed, job.priority, 1, tag, self._count))

    def push_front(self, job: J) -> None:
        """Before all that have the same claim: it had its turn, and lost it through no fault of its own."""
        self._count += 1
        self._add(job, (not job.resumed, job.priority, 0, 0.0, -self._count))

    def take(self, job: J) -> None:
        """It has its turn."""
        _, priority, behind, tag, _ = self._places[job][0]
        if self._fair and behind and not job.resumed:
            self._shares[priority].served(tag)
        self.discard(job)

    def discard(self, job: J) -> None:
        """It waits no longer, if it did."""
        if job not in self._places:
            return
        place, need = self._places.pop(job)
        del self._order[bisect_left(self._order, place, key=lambda entry: entry[0])]
        del self._needs[bisect_left(self._needs, need)]
        if place[0]:
            self._classes[place[1]] -= 1

    def used_less(self, job: J, tokens: int) -> None:
        """The job has ended and took so many tokens less of its key's share than was thought."""
        if self._fair and job.priority in self._shares:
            self._shares[job.priority].back(job.key, tokens)

    def _add(self, job: J, place: Any) -> None:
        self._places[job] = place, job.reserve_tokens
        insort(self._order, (place, job), key=lambda entry: entry[0])
        insort(self._needs, job.reserve_tokens)
        if not job.resumed:
            self._classes[job.priority] = self._classes.get(job.priority, 0) + 1

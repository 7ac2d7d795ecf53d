"""Order of waiting jobs: migrated work before new work, then priority, then fair share among API keys, then arrival.

Fair share is start-time fair queueing (Goyal, Vin and Cheng, 1996). Each job gets a start tag: the virtual time at
which its key would reach it if all keys had equal shares of the tokens. The smallest tag goes first, so a key that asks
for many tokens waits behind one that asks for few. An idle key saves up no share.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Iterator
from typing import Any

from overfill.routing.job import Job

_MAX_KEYS = 1024  # number of finish tags from which on the queue drops past ones


class VirtualClock:
    """Virtual time of one priority, and the finish tag of each key's latest job, in tokens."""

    def __init__(self) -> None:
        self._virtual_time = 0.0
        self._finish_tags: dict[str, float] = {}

    def start_tag(self, key: str, tokens: int) -> float:
        """Returns the start tag of a job of ``tokens`` that arrives now, and charges the job to ``key``."""
        if len(self._finish_tags) >= _MAX_KEYS:
            self._finish_tags = {key: end for key, end in self._finish_tags.items() if end > self._virtual_time}
        start = self.next_start_tag(key)
        self._finish_tags[key] = start + tokens
        return start

    def next_start_tag(self, key: str) -> float:
        """Returns the start tag that the next job of ``key`` would get now."""
        return max(self._virtual_time, self._finish_tags.get(key, 0.0))

    def advance_virtual_time(self, tag: float) -> None:
        """Moves virtual time to the start tag of a job that leaves the queue for a worker."""
        self._virtual_time = max(self._virtual_time, tag)

    def refund(self, key: str, tokens: int) -> None:
        """Refunds ``tokens`` that were charged to ``key`` and not used."""
        if key in self._finish_tags:
            self._finish_tags[key] -= tokens


class FairQueue:
    """Waiting jobs, in the order in which they are placed.

    Args:
        fair: True to divide each priority fairly among keys; False to serve it in order of arrival.
    """

    def __init__(self, *, fair: bool = True) -> None:
        self._fair = fair
        self._clocks: dict[int, VirtualClock] = {}
        self._order: list[tuple[Any, Job]] = []
        self._positions: dict[Job, tuple[Any, int]] = {}  # place in the order, tokens to reserve
        self._sorted_needs: list[int] = []
        self._num_new: Counter[int] = Counter()
        self._num_of: Counter[tuple[int, str]] = Counter()  # the same by key too
        self._count = 0

    def __iter__(self) -> Iterator[Job]:
        """Iterates in order. The caller may remove the job that was yielded last."""
        index = 0
        while index < len(self._order):
            entry = self._order[index]
            yield entry[1]
            index += index < len(self._order) and self._order[index] is entry

    def snapshot(self) -> list[Job]:
        """The waiting jobs, in order. Callable from any thread."""
        return [job for _, job in list(self._order)]

    def __len__(self) -> int:
        return len(self._order)

    def __contains__(self, job: object) -> bool:
        return job in self._positions

    @property
    def smallest_need(self) -> int:
        """Tokens that the smallest waiting job must reserve; 0 when the queue is empty."""
        return self._sorted_needs[0] if self._sorted_needs else 0

    def waiting(self, priority: int) -> int:
        """Number of waiting jobs of ``priority``, migrated ones excluded."""
        return self._num_new[priority]

    def waiting_of(self, priority: int, key: str) -> int:
        """Number of waiting jobs of ``priority`` and ``key``, migrated ones excluded."""
        return self._num_of[priority, key]

    def ahead(self, priority: int, key: str) -> int:
        """Number of jobs that would go before a new one."""
        tag = self._clocks[priority].next_start_tag(key) if priority in self._clocks else 0.0
        return bisect_left(self._order, (1, priority, 1, tag, self._count + 1), key=lambda entry: entry[0])

    def append(self, job: Job) -> None:
        """Adds a job behind the others of its rank."""
        self._count += 1
        tag = 0.0
        if self._fair and not job.migrated:
            job.charged = job.total_tokens
            tag = self._clocks.setdefault(job.priority, VirtualClock()).start_tag(job.key, job.charged)
        self._add(job, (not job.migrated, job.priority, 1, tag, self._count))

    def push_front(self, job: Job) -> None:
        """Adds a job before the others of its rank: a worker refused it after it had been first."""
        self._count += 1
        self._add(job, (not job.migrated, job.priority, 0, 0.0, -self._count))

    def take(self, job: Job) -> None:
        """Removes a job that goes to a worker, and advances virtual time."""
        _, priority, behind, tag, _ = self._positions[job][0]
        if self._fair and behind and not job.migrated:
            self._clocks[priority].advance_virtual_time(tag)
        self.discard(job)

    def discard(self, job: Job) -> None:
        """Removes ``job`` if it waits."""
        if job not in self._positions:
            return
        place, need = self._positions.pop(job)
        del self._order[bisect_left(self._order, place, key=lambda entry: entry[0])]
        del self._sorted_needs[bisect_left(self._sorted_needs, need)]
        if place[0]:
            self._count_new(job, -1)

    def refund(self, job: Job, tokens: int) -> None:
        """Refunds ``tokens`` of an ended job to its key: those charged and not used."""
        if self._fair and job.priority in self._clocks:
            self._clocks[job.priority].refund(job.key, tokens)

    def _add(self, job: Job, place: Any) -> None:
        self._positions[job] = place, job.reserve_tokens
        insort(self._order, (place, job), key=lambda entry: entry[0])
        insort(self._sorted_needs, job.reserve_tokens)
        if not job.migrated:
            self._count_new(job, 1)

    def _count_new(self, job: Job, change: int) -> None:
        self._num_new[job.priority] += change
        self._num_of[job.priority, job.key] += change
        if not self._num_of[job.priority, job.key]:
            del self._num_of[job.priority, job.key]

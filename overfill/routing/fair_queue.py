"""Order of waiting jobs: migrated work before new work, then priority, then fair share among API keys, then their
sessions in turn, then arrival.

Fair share is start-time fair queueing (Goyal, Vin and Cheng, 1996). Each job gets a start tag: the virtual time at
which its key would reach it if all keys had equal shares of the tokens. The smallest tag goes first, so a key that asks
for many tokens waits behind one that asks for few. An idle key saves up no share.

The sessions of a key share its places in the queue, a job of each in turn. So a client that names many sessions gets no
more than its key's share.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Iterator
from typing import Any

from overfill.routing.job import Job

_MAX_KEYS = 1024  # number of finish tags from which on the queue drops past ones

_MAX_SESSIONS = 1024
"""Number of sessions of a key after which a new round begins, so that new ones cannot go first for ever."""


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

    def skip(self, tokens: float) -> None:
        """Moves virtual time by ``tokens``."""
        self._virtual_time += tokens

    def __len__(self) -> int:
        return len(self._finish_tags)

    def refund(self, key: str, tokens: int) -> None:
        """Refunds ``tokens`` that were charged to ``key`` and not used."""
        if key in self._finish_tags:
            self._finish_tags[key] -= tokens


class _KeyJobs:
    """The waiting jobs of one key and priority in their order: a job of each session in turn."""

    def __init__(self) -> None:
        self._clock = VirtualClock()  # each job counts as 1
        self._order: list[tuple[float, int, Job]] = []  # turn, arrival
        self._turns: dict[Job, tuple[float, int]] = {}

    def __len__(self) -> int:
        return len(self._order)

    def first_behind(self, session: str) -> Job | None:
        """Returns the job before which the next job of ``session`` would go; None if it would be the last."""
        index = bisect_left(self._order, (self._clock.next_start_tag(session), math.inf), key=lambda entry: entry[:2])
        return self._order[index][2] if index < len(self._order) else None

    def add(self, job: Job, arrival: int) -> list[Job]:
        """Adds a job. Returns it and the jobs behind it."""
        if len(self._clock) >= _MAX_SESSIONS:
            self._clock.skip(1)
        turn = self._turns[job] = self._clock.start_tag(job.session, 1), arrival
        index = bisect_left(self._order, turn, key=lambda entry: entry[:2])
        self._order.insert(index, (*turn, job))
        return [entry[2] for entry in self._order[index:]]

    def take(self, job: Job) -> None:
        """Notes that it is the turn of ``job``."""
        self._clock.advance_virtual_time(self._turns[job][0])

    def discard(self, job: Job) -> None:
        """Removes ``job`` if it is one of these."""
        if (turn := self._turns.pop(job, None)) is not None:
            del self._order[bisect_left(self._order, turn, key=lambda entry: entry[:2])]


class FairQueue:
    """Waiting jobs, in the order in which they are placed.

    Args:
        fair: True to divide each priority fairly among keys and their sessions; False to serve it in order of arrival.
    """

    def __init__(self, *, fair: bool = True) -> None:
        self._fair = fair
        self._clocks: dict[int, VirtualClock] = {}
        self._order: list[tuple[Any, Job]] = []
        self._positions: dict[Job, tuple[Any, int]] = {}  # place in the order, tokens to reserve
        self._sorted_needs: list[int] = []
        self._num_new: Counter[int] = Counter()
        self._num_of: Counter[tuple[int, str]] = Counter()  # the same by key too
        self._of_key: dict[tuple[int, str], _KeyJobs] = {}  # without those that were pushed to the front
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

    def ahead(self, priority: int, key: str, session: str | None = None) -> int:
        """Number of jobs that would go before a new one; without ``session``, before one behind all jobs of its key."""
        jobs = None if session is None else self._of_key.get((priority, key))
        if session is not None and jobs is not None and (behind := jobs.first_behind(session)) is not None:
            return self._index(self._positions[behind][0])
        tag = self._clocks[priority].next_start_tag(key) if priority in self._clocks else 0.0
        return self._index((1, priority, 1, tag, self._count + 1))

    def append(self, job: Job) -> None:
        """Adds a job behind the others of its rank."""
        self._count += 1
        tag = 0.0
        if self._fair and not job.migrated:
            job.charged = job.total_tokens
            tag = self._clocks.setdefault(job.priority, VirtualClock()).start_tag(job.key, job.charged)
        self._add(job, (not job.migrated, job.priority, 1, tag, self._count))
        if self._fair and not job.migrated:
            jobs = self._of_key.setdefault((job.priority, job.key), _KeyJobs())
            self._move_up(jobs.add(job, self._count))

    def push_front(self, job: Job) -> None:
        """Adds a job before the others of its rank: a worker refused it after it had been first."""
        self._count += 1
        self._add(job, (not job.migrated, job.priority, 0, 0.0, -self._count))

    def take(self, job: Job) -> None:
        """Removes a job that goes to a worker, and advances virtual time."""
        _, priority, behind, tag, _ = self._positions[job][0]
        if self._fair and behind and not job.migrated:
            self._clocks[priority].advance_virtual_time(tag)
            self._of_key[priority, job.key].take(job)
        self.discard(job)

    def discard(self, job: Job) -> None:
        """Removes ``job`` if it waits."""
        if job not in self._positions:
            return
        place, need = self._positions.pop(job)
        del self._order[self._index(place)]
        del self._sorted_needs[bisect_left(self._sorted_needs, need)]
        if place[0]:
            self._count_new(job, -1)
        if (jobs := self._of_key.get((job.priority, job.key))) is not None:
            jobs.discard(job)
            if not jobs:
                del self._of_key[job.priority, job.key]

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

    def _move_up(self, jobs: list[Job]) -> None:
        """Gives the first of a key's jobs the first of their places; it has the last. The others move back by one."""
        places = [self._positions[job][0] for job in (*jobs[1:], jobs[0])]
        index = self._index(places[0])
        for job, place in zip(jobs, places, strict=True):
            while self._order[index][0] is not place:  # the places of other keys
                index += 1
            self._order[index] = place, job
            self._positions[job] = place, self._positions[job][1]

    def _index(self, place: Any) -> int:
        """Index of the first job that is not before ``place``."""
        return bisect_left(self._order, place, key=lambda entry: entry[0])

    def _count_new(self, job: Job, change: int) -> None:
        self._num_new[job.priority] += change
        self._num_of[job.priority, job.key] += change
        if not self._num_of[job.priority, job.key]:
            del self._num_of[job.priority, job.key]

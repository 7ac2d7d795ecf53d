"""Which workers of a pool can take a job: by size, free room and adapter, and by the jobs that claim workers."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import islice

from overfill.errors import PromptTooLong
from overfill.routing.index import capacity_of
from overfill.routing.job import Job
from overfill.routing.pool import Pool
from overfill.routing.tier import Adapter
from overfill.routing.worker import PREFILL, Worker

_TRIES = 16
"""Number of workers tried in the policy's order; then the emptiest worker with enough room is used."""


class Claims:
    """What the blocked jobs of a tier leave to the jobs behind them in the queue.

    The first blocked job without an adapter may claim capacity, and the first with each adapter. No job behind them is
    placed on a worker that can hold one of them.

    Args:
        pool: the tier's decode workers.
    """

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._tokens: dict[str, int] = {}  # of the claiming jobs, by name of the adapter; "" without one
        self._rooms: dict[str, float] = {}  # by adapter: no unclaimed worker that has it has more for another job

    def __bool__(self) -> bool:
        return bool(self._tokens)

    def add(self, job: Job) -> None:
        """Adds the claim of ``job`` if it is the first with its adapter, or the first without one."""
        self._tokens.setdefault("" if job.adapter is None else job.adapter.name, job.total_tokens)

    def on(self, worker: Worker) -> bool:
        """True if a claiming job could run on ``worker``."""
        if "" in self._tokens and worker.could_hold(self._tokens[""]):
            return True
        claimed = self._tokens.keys() & worker.adapters.keys()
        return any(worker.could_hold(self._tokens[name]) for name in claimed)

    def on_all(self) -> bool:
        """True if every admissible worker is claimed, with or without adapters."""
        return self._pool.index.admissible.smallest >= self._tokens.get("", math.inf)

    def may_leave_room(self, job: Job) -> bool:
        """False if no worker that has the job's adapter has room for it. Without an adapter, the pool's index says."""
        adapter = job.adapter
        if adapter is None:
            return True
        if adapter.name not in self._rooms:
            self._rooms[adapter.name] = math.inf if any(True for _ in _admissible(self._pool, adapter)) else -1.0
        return self._rooms[adapter.name] >= job.reserve_tokens

    def blocked(self, job: Job) -> None:
        """Notes that ``find`` has found no worker for ``job``: looks how much room it leaves to others."""
        if job.adapter is not None:
            free = (worker for worker in _admissible(self._pool, job.adapter) if not self.on(worker))
            self._rooms[job.adapter.name] = max((worker.room_tokens for worker in free), default=-1.0)


def find(pool: Pool, job: Job, tokens: int, room: int | None = None, claims: Claims | None = None) -> Worker | None:
    """Returns the best admissible worker of ``pool`` for ``job``, or None.

    Args:
        tokens: length of the longest sequence that the worker must be able to hold.
        room: number of tokens that must fit now. None means no condition.
        claims: jobs that claim the workers that can hold them.
    """
    index, adapter = pool.index, _adapter(job, pool)
    if index.admissible.largest < tokens or (room is not None and index.max_room < room):
        return None
    # Try workers that failed the job again only when no other is alive.
    avoid = job.avoid if job.avoid and _others_alive(pool, job, tokens) else ()

    def fits(worker: Worker) -> bool:
        return (
            worker.could_hold(tokens)
            and (room is None or worker.has_room(room))
            and (not avoid or worker.seat not in avoid)
            and (adapter is None or worker.has(adapter))
            and (not claims or not claims.on(worker))
        )

    best = pool.policy.best(job)
    if room is None:
        return next((worker for worker in best if fits(worker)), None)
    worker = next((worker for worker in islice(best, _TRIES) if fits(worker)), None)
    if worker is not None or adapter is None:
        return worker or next((worker for worker in index.by_room(room) if fits(worker)), None)
    having = (worker for worker in _admissible(pool, adapter) if fits(worker))
    return max(having, key=lambda worker: worker.room_tokens, default=None)


def too_large(pool: Pool, job: Job, tokens: int) -> PromptTooLong | None:
    """Returns the error of a job that no worker of ``pool`` can ever hold, as long as none joins; None if one can.

    Args:
        tokens: length of the longest sequence that the worker must be able to hold.
    """
    adapter = _adapter(job, pool)
    largest = math.inf  # without a worker, the job waits for one
    if adapter is not None:
        largest = max((capacity_of(one) for one in pool.having(adapter) if not one.draining), default=largest)
    elif pool.index.not_draining:
        largest = pool.index.not_draining.largest
    if largest >= tokens:
        return None
    field = "prompt" if job.prompt_tokens >= largest else "sampling.max_tokens"
    what = "the prompt" if pool.stage == PREFILL else "the prompt with its answer"
    advice = "shorten the prompt" if field == "prompt" else "ask for fewer tokens"
    title = pool.title + (f" with the adapter {adapter.name!r}" if adapter is not None else "")
    return PromptTooLong(field, f"{what} needs {tokens} tokens; the largest {title} holds {largest:.0f}: {advice}")


def _adapter(job: Job, pool: Pool) -> Adapter | None:
    """Returns the adapter that a worker of ``pool`` needs for the job."""
    return None if pool.stage == PREFILL else job.adapter


def _admissible(pool: Pool, adapter: Adapter) -> Iterator[Worker]:
    return filter(pool.index.is_admissible, pool.having(adapter))


def _others_alive(pool: Pool, job: Job, tokens: int) -> bool:
    """True if a worker is alive that is large enough and has not failed the job."""
    if (adapter := _adapter(job, pool)) is not None:
        having = (worker for worker in pool.having(adapter) if pool.index.is_alive(worker))
        return any(worker.could_hold(tokens) and worker.seat not in job.avoid for worker in having)
    failed = 0
    for seat in job.avoid:
        worker = pool.get(seat[0])
        if worker is not None and worker.seat == seat and worker.could_hold(tokens):
            failed += pool.index.is_alive(worker)
    return pool.index.alive.holding(tokens) > failed

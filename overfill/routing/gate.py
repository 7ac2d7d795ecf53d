"""The dispatcher for coroutines: a placement is the result of a future. All calls on the event loop."""

from __future__ import annotations

import asyncio

from overfill.routing.dispatcher import Dispatcher, Job, Placement
from overfill.routing.worker import Worker
from overfill.v1 import common_pb2, decode_pb2, registry_pb2

TICK = 0.5
"""Seconds between looks at the clock while a job waits."""

Grant = asyncio.Future[Worker]
"""Resolves to the worker that the job may use, or to the error with which its wait ended."""


class Gate:
    """Lets jobs wait. Its methods are the dispatcher's, each followed by a ``poll``.

    The time is the event loop's (seconds, monotonic).
    """

    def __init__(self, dispatcher: Dispatcher) -> None:
        self._dispatcher = dispatcher
        self._grants: dict[Job, Grant] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._moves = 0
        self._moved = asyncio.Event()

    @property
    def moves(self) -> int:
        """Grows whenever what waits, or what workers hold, may have changed."""
        return self._moves

    async def moved(self, since: int) -> None:
        """Returns once ``moves`` is not ``since`` any more."""
        while self._moves == since:
            self._moved.clear()
            await self._moved.wait()

    def admit(self, priority: int, key: str, time_left: float | None, *, begun: bool = False) -> None:
        """Whether a new job would be taken now; raises Overloaded. See ``Dispatcher.admit``."""
        now = self._now()
        self._dispatcher.admit(priority, key, now, None if time_left is None else now + time_left, begun=begun)

    def submit(self, job: Job) -> Grant:
        """Grants a decode worker. Raises PromptTooLong or Overloaded at once."""
        self._dispatcher.submit(job, self._now())
        return self._grant(job)

    def refused(self, job: Job, load: decode_pb2.WorkerLoad | None) -> Grant:
        """Grants a decode worker, after the last one would not take the job; see ``Dispatcher.refused``."""
        self._dispatcher.refused(job, load)
        return self._grant(job)

    def lost(self, job: Job, *, gone: bool) -> Grant:
        """Grants a decode worker, after the last one failed the job or is ``gone``."""
        self._dispatcher.lost(job, self._now(), gone=gone)
        return self._grant(job)

    def queued(self, stage: common_pb2.Stage) -> int:
        """Jobs that wait for a worker of ``stage``."""
        return self._dispatcher.queued(stage)

    def reserved(self, job: Job) -> Grant:
        """Grants a prefill slot."""
        self._dispatcher.reserved(job)
        return self._grant(job)

    def need_prefill(self, job: Job, tried: Worker | None, *, failed: bool, closed: bool) -> Grant:
        """Grants a prefill slot again; see ``Dispatcher.need_prefill``."""
        self._dispatcher.need_prefill(job, tried, failed=failed, closed=closed)
        return self._grant(job)

    def prefill_done(self, job: Job) -> None:
        """The first token has come: gives the prefill slot back, if the job holds one."""
        if job.prefill is not None:
            self._dispatcher.prefill_done(job, self._now())
            self._move()
            self.poll()

    def finish(self, job: Job) -> None:
        """Frees what the job holds and ends its wait."""
        self._dispatcher.finish(job)
        if (grant := self._grants.pop(job, None)) is not None:
            grant.cancel()
        self._move()
        self.poll()

    def report(self, worker: Worker, report: registry_pb2.Report) -> None:
        """Takes a worker's report."""
        self._dispatcher.report(worker, report, self._now())
        if self._dispatcher.num_waiting:
            self._move()  # who waits for which stage depends on what there is
        self.poll()

    def poll(self) -> None:
        """Looks for placements; call it when a worker left."""
        for outcome in self._dispatcher.poll(self._now()):
            self._move()
            grant = self._grants.pop(outcome.job, None)
            # A cancelled wait is followed by finish(), which frees what was granted too late.
            if grant is None or grant.done():
                continue
            if isinstance(outcome, Placement):
                grant.set_result(outcome.worker)
            else:
                grant.set_exception(outcome.error)
        if self._timer is None and self._dispatcher.num_waiting:
            self._timer = asyncio.get_running_loop().call_later(TICK, self._tick)

    def _tick(self) -> None:
        self._timer = None
        self.poll()

    def _grant(self, job: Job) -> Grant:
        grant: Grant = asyncio.get_running_loop().create_future()
        self._grants[job] = grant
        self._move()
        self.poll()
        return grant

    def _move(self) -> None:
        self._moves += 1
        self._moved.set()

    def _now(self) -> float:
        return asyncio.get_running_loop().time()

"""The dispatcher for coroutines: a placement is the result of a future. All calls on the event loop."""

from __future__ import annotations

import asyncio

from overfill.routing.dispatcher import Dispatcher, Job, Placement
from overfill.routing.worker import Worker
from overfill.v1 import common_pb2, decode_pb2, registry_pb2

TICK = 0.5
"""Seconds between looks at the clock while a job waits."""

PlacementFuture = asyncio.Future[Worker]
"""Resolves to the worker that the job may use, or to the error with which its wait ended."""


class AsyncDispatcher:
    """Lets jobs wait. Its methods are the dispatcher's, each followed by a ``poll``.

    The time is the event loop's (seconds, monotonic).
    """

    def __init__(self, dispatcher: Dispatcher) -> None:
        self._dispatcher = dispatcher
        self._futures: dict[Job, PlacementFuture] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._version = 0
        self._changed = asyncio.Event()

    @property
    def version(self) -> int:
        """Grows whenever what waits, or what workers hold, may have changed."""
        return self._version

    async def changed_since(self, version: int) -> None:
        """Returns once ``moves`` is not ``since`` any more."""
        while self._version == version:
            self._changed.clear()
            await self._changed.wait()

    def admit(self, priority: int, key: str, time_left: float | None, *, client_resumes: bool = False) -> None:
        """Whether a new job would be taken now; raises Overloaded. See ``Dispatcher.admit``."""
        now = self._now()
        self._dispatcher.admit(
            priority, key, now, None if time_left is None else now + time_left, client_resumes=client_resumes
        )

    def submit(self, job: Job) -> PlacementFuture:
        """Grants a decode worker. Raises PromptTooLong or Overloaded at once."""
        self._dispatcher.submit(job, self._now())
        return self._await_placement(job)

    def refused(self, job: Job, load: decode_pb2.WorkerLoad | None) -> PlacementFuture:
        """Grants a decode worker, after the last one would not take the job; see ``Dispatcher.refused``."""
        self._dispatcher.refused(job, load)
        return self._await_placement(job)

    def lost(self, job: Job, *, gone: bool) -> PlacementFuture:
        """Grants a decode worker, after the last one failed the job or is ``gone``."""
        self._dispatcher.lost(job, self._now(), gone=gone)
        return self._await_placement(job)

    def queued(self, stage: common_pb2.Stage) -> int:
        """Jobs that wait for a worker of ``stage``."""
        return self._dispatcher.queued(stage)

    def reserved(self, job: Job) -> PlacementFuture:
        """Grants a prefill slot."""
        self._dispatcher.reserved(job)
        return self._await_placement(job)

    def need_prefill(self, job: Job, tried: Worker | None, *, failed: bool, pause: bool) -> PlacementFuture:
        """Grants a prefill slot again; see ``Dispatcher.need_prefill``."""
        self._dispatcher.need_prefill(job, tried, failed=failed, pause=pause)
        return self._await_placement(job)

    def prefill_done(self, job: Job) -> None:
        """The first token has come: gives the prefill slot back, if the job holds one."""
        if job.prefill is not None:
            self._dispatcher.prefill_done(job, self._now())
            self._note_change()
            self.poll()

    def finish(self, job: Job) -> None:
        """Frees what the job holds and ends its wait."""
        self._dispatcher.finish(job)
        if (future := self._futures.pop(job, None)) is not None:
            future.cancel()
        self._note_change()
        self.poll()

    def report(self, worker: Worker, report: registry_pb2.Report) -> None:
        """Takes a worker's report."""
        self._dispatcher.report(worker, report, self._now())
        if self._dispatcher.num_waiting:
            self._note_change()  # who waits for which stage depends on what there is
        self.poll()

    def poll(self) -> None:
        """Looks for placements; call it when a worker left."""
        for outcome in self._dispatcher.poll(self._now()):
            self._note_change()
            future = self._futures.pop(outcome.job, None)
            # A cancelled wait is followed by finish(), which frees what was granted too late.
            if future is None or future.done():
                continue
            if isinstance(outcome, Placement):
                future.set_result(outcome.worker)
            else:
                future.set_exception(outcome.error)
        if self._timer is None and self._dispatcher.num_waiting:
            self._timer = asyncio.get_running_loop().call_later(TICK, self._tick)

    def _tick(self) -> None:
        self._timer = None
        self.poll()

    def _await_placement(self, job: Job) -> PlacementFuture:
        future: PlacementFuture = asyncio.get_running_loop().create_future()
        self._futures[job] = future
        self._note_change()
        self.poll()
        return future

    def _note_change(self) -> None:
        self._version += 1
        self._changed.set()

    def _now(self) -> float:
        return asyncio.get_running_loop().time()

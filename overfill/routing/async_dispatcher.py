"""The dispatcher for coroutines: each placement is a future. All calls are made on the event loop."""

from __future__ import annotations

import asyncio

from overfill.routing.dispatcher import Dispatcher, Job, Placement
from overfill.routing.worker import Worker
from overfill.v1 import common_pb2, decode_pb2, registry_pb2

TICK = 0.5
"""Seconds between polls while a job waits."""

PlacementFuture = asyncio.Future[Worker]
"""Resolves to the worker on which the job is placed, or fails with the error that ended its wait."""


class AsyncDispatcher:
    """Wraps ``Dispatcher``: the same methods, each followed by a ``poll``, on the event loop's clock (seconds)."""

    def __init__(self, dispatcher: Dispatcher) -> None:
        self._dispatcher = dispatcher
        self._futures: dict[Job, PlacementFuture] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._version = 0
        self._changed = asyncio.Event()

    @property
    def version(self) -> int:
        """Counter that grows whenever the queues or the workers' requests may have changed."""
        return self._version

    async def changed_since(self, version: int) -> None:
        """Returns once ``self.version`` differs from ``version``."""
        while self._version == version:
            self._changed.clear()
            await self._changed.wait()

    def admit(self, priority: int, key: str, time_left: float | None, *, client_resumes: bool = False) -> None:
        """Raises Overloaded if the router would refuse a new job now. See ``Dispatcher.admit``."""
        now = self._now()
        self._dispatcher.admit(
            priority, key, now, None if time_left is None else now + time_left, client_resumes=client_resumes
        )

    def submit(self, job: Job) -> PlacementFuture:
        """Queues a new job for a decode worker. Raises PromptTooLong or Overloaded at once."""
        self._dispatcher.submit(job, self._now())
        return self._await_placement(job)

    def refused(self, job: Job, load: decode_pb2.WorkerLoad | None) -> PlacementFuture:
        """Queues the job for another decode worker after one refused it; see ``Dispatcher.refused``."""
        self._dispatcher.refused(job, load)
        return self._await_placement(job)

    def lost(self, job: Job, *, gone: bool) -> PlacementFuture:
        """Queues the job for another decode worker after one failed it; see ``Dispatcher.lost``."""
        self._dispatcher.lost(job, self._now(), gone=gone)
        return self._await_placement(job)

    def queued(self, stage: common_pb2.Stage) -> int:
        """Number of jobs that wait for a worker of ``stage``; see ``Dispatcher.queued``."""
        return self._dispatcher.queued(stage)

    def prefill_with_start(self, job: Job) -> Worker | None:
        """Takes a free prefill slot for a job that has just been placed; see ``Dispatcher.prefill_with_start``."""
        worker = self._dispatcher.prefill_with_start(job)
        if worker is not None:
            self._note_change()
        return worker

    def reserved(self, job: Job) -> PlacementFuture | None:
        """Queues the job for a prefill slot: its decode worker has reserved blocks. None if the job holds one."""
        if self._dispatcher.reserved(job):
            return None
        return self._await_placement(job)

    def need_prefill(self, job: Job, tried: Worker | None, *, failed: bool, pause: bool) -> PlacementFuture:
        """Queues the job for another prefill slot; see ``Dispatcher.need_prefill``."""
        self._dispatcher.need_prefill(job, tried, failed=failed, pause=pause)
        return self._await_placement(job)

    def prefill_done(self, job: Job) -> None:
        """Releases the job's prefill slot, if it holds one: its first token has arrived."""
        if job.prefill is not None:
            self._dispatcher.prefill_done(job, self._now())
            self._note_change()
            self.poll()

    def finish(self, job: Job) -> None:
        """Releases the job's slots and ends its wait."""
        self._dispatcher.finish(job)
        if (future := self._futures.pop(job, None)) is not None:
            future.cancel()
        self._note_change()
        self.poll()

    def report(self, worker: Worker, report: registry_pb2.Report) -> None:
        """Applies a worker's report."""
        self._dispatcher.report(worker, report, self._now())
        if self._dispatcher.num_waiting:
            self._note_change()  # the report may change for which stage a job waits
        self.poll()

    def poll(self) -> None:
        """Makes the placements that are possible now. Call it after a worker has been removed."""
        for outcome in self._dispatcher.poll(self._now()):
            self._note_change()
            future = self._futures.pop(outcome.job, None)
            # finish() follows a cancelled wait and releases a slot that was assigned too late.
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

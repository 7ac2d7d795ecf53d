"""The dispatcher on the event loop: each placement is a call of the job's callback. All calls are made on the loop."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextvars import Context

from overfill.errors import OverfillError
from overfill.routing.dispatcher import Dispatcher, Placement, Rejection
from overfill.routing.job import Job, JobState
from overfill.routing.pool import Pool
from overfill.routing.worker import Worker
from overfill.v1 import decode_pb2, registry_pb2

logger = logging.getLogger(__name__)

TICK = 0.5
"""Seconds between polls while a job waits."""

OnPlaced = Callable[[Worker | OverfillError], None]
"""Receives the worker on which the job is placed, or the error that ended its wait.

The dispatcher calls it once, possibly before the method that queued the job returns. If it raises, the dispatcher logs
the error and finishes the job.
"""


class AsyncDispatcher:
    """Wraps ``Dispatcher``: the same methods, each followed by a ``poll``, on the event loop's clock (seconds).

    A method that queues a job takes the callback of its placement. ``finish`` forgets the callback.
    """

    def __init__(self, dispatcher: Dispatcher) -> None:
        self._dispatcher = dispatcher
        self._callbacks: dict[Job, OnPlaced] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._polling = self._poll_again = False
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

    def admit(
        self,
        tier: str,
        priority: int,
        key: str,
        time_left: float | None,
        *,
        session: str = "",
        client_resumes: bool = False,
    ) -> None:
        """Raises Overloaded if the router would refuse a new job now. See ``Dispatcher.admit``."""
        now = self._now()
        self._dispatcher.admit(
            tier,
            priority,
            key,
            now,
            None if time_left is None else now + time_left,
            session=session,
            client_resumes=client_resumes,
        )

    def submit(self, job: Job, on_placed: OnPlaced) -> None:
        """Queues a new job for a decode worker. Raises PromptTooLong or Overloaded at once."""
        self._dispatcher.submit(job, self._now())
        self._wait(job, on_placed)

    def refused(self, job: Job, on_placed: OnPlaced, load: decode_pb2.WorkerLoad | None) -> None:
        """Queues the job for another decode worker after one refused it; see ``Dispatcher.refused``."""
        self._dispatcher.refused(job, load)
        self._wait(job, on_placed)

    def lost(self, job: Job, on_placed: OnPlaced, *, gone: bool) -> None:
        """Queues the job for another decode worker after one failed it; see ``Dispatcher.lost``."""
        self._dispatcher.lost(job, self._now(), gone=gone)
        self._wait(job, on_placed)

    def queued(self, pool: Pool) -> int:
        """Number of jobs that wait for a worker of ``pool``; see ``Dispatcher.queued``."""
        return self._dispatcher.queued(pool)

    def prefill_with_start(self, job: Job) -> Worker | None:
        """Takes a free prefill slot for a job that has just been placed; see ``Dispatcher.prefill_with_start``."""
        worker = self._dispatcher.prefill_with_start(job)
        if worker is not None:
            self._note_change()
        return worker

    def reserved(self, job: Job, on_placed: OnPlaced, *, has_prompt: bool = False) -> bool:
        """Queues the job for a prefill slot, since its decode worker has reserved blocks; see ``Dispatcher.reserved``.

        Returns True if the job holds a slot or needs none.
        """
        held = job.prefill is not None
        if self._dispatcher.reserved(job, has_prompt=has_prompt):
            if held and job.prefill is None:
                self._freed(left_queue=False)
            return True
        self._wait(job, on_placed)
        return False

    def need_prefill(self, job: Job, on_placed: OnPlaced, tried: Worker | None, *, failed: bool, pause: bool) -> None:
        """Queues the job for another prefill slot; see ``Dispatcher.need_prefill``."""
        self._dispatcher.need_prefill(job, tried, failed=failed, pause=pause)
        self._wait(job, on_placed)

    def prefill_done(self, job: Job) -> None:
        """Releases the job's prefill slot, if it holds or waits for one: a token of its answer has arrived."""
        waited = job.state is JobState.WANTS_PREFILL
        if job.prefill is not None or waited:
            self._callbacks.pop(job, None)
            self._dispatcher.prefill_done(job, self._now())
            self._freed(left_queue=waited)

    def finish(self, job: Job) -> None:
        """Releases the job's slots and ends its wait."""
        waited = job.state in (JobState.WAITING, JobState.WANTS_PREFILL)
        self._dispatcher.finish(job)
        self._callbacks.pop(job, None)
        self._freed(left_queue=waited)

    def report(self, worker: Worker, report: registry_pb2.Report) -> None:
        """Applies a worker's report."""
        self._dispatcher.report(worker, report, self._now())
        if self._dispatcher.num_waiting:
            self._note_change()  # the report may change for which stage a job waits
        self.poll()

    def poll(self) -> None:
        """Makes the placements that are possible now. Call it after a worker has been removed.

        When a callback calls ``poll``, the dispatcher polls again after the callback returns, so callbacks never nest.
        """
        self._poll_again = True
        if self._polling:
            return
        self._polling = True
        try:
            while self._poll_again:
                self._poll_again = False
                expired = self._dispatcher.reservations.num_expired
                for outcome in self._dispatcher.poll(self._now()):
                    self._tell(outcome)
                if self._dispatcher.reservations.num_expired != expired:
                    self._note_change()  # prefill slots are free again
        finally:
            self._polling = False
        if self._timer is None and self._dispatcher.num_waiting:
            # An empty context: the timer belongs to all requests.
            self._timer = asyncio.get_running_loop().call_later(TICK, self._tick, context=Context())

    def _tell(self, outcome: Placement | Rejection) -> None:
        self._note_change()
        on_placed = self._callbacks.pop(outcome.job, None)
        if on_placed is None:
            return  # an earlier callback has finished the job
        try:
            on_placed(outcome.worker if isinstance(outcome, Placement) else outcome.error)
        except Exception as error:  # it must not end the other placements
            # An empty context: the current one may be another request's.
            Context().run(logger.error, "request %s failed when it was placed", outcome.job.id, exc_info=error)
            self.finish(outcome.job)

    def _tick(self) -> None:
        self._timer = None
        self.poll()

    def _wait(self, job: Job, on_placed: OnPlaced) -> None:
        self._callbacks[job] = on_placed
        self._note_change()
        self.poll()

    def _freed(self, left_queue: bool = False) -> None:
        self._note_change()
        if left_queue or self._dispatcher.num_waiting:
            self.poll()

    def _note_change(self) -> None:
        self._version += 1
        self._changed.set()

    def _now(self) -> float:
        return asyncio.get_running_loop().time()

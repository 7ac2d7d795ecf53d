"""One attempt at one request: the exchange with one decode worker.

The router sends Start, with a prefill worker if a slot is free; the worker answers Reserved or Refused. If Start had no
prefill worker, the router then gets a slot and sends AssignPrefill. Then the worker sends Tokens and Done. After
Reserved, it may send NeedPrefill at any time.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from overfill.errors import Incompatible, InternalError, OverfillError, Overloaded, Unavailable
from overfill.routing.answer import AnswerState
from overfill.routing.async_dispatcher import AsyncDispatcher, PlacementFuture
from overfill.routing.dispatcher import Job
from overfill.routing.stream import DecodeConnector, DecodeStream
from overfill.routing.worker import Worker, WorkerInfo
from overfill.telemetry import tracing
from overfill.v1 import decode_pb2

_Need = decode_pb2.NeedPrefill


class GaveUp(Exception):
    """Ends the request with ``error``, without another attempt."""

    def __init__(self, error: OverfillError) -> None:
        super().__init__(str(error))
        self.error = error


class Attempt:
    """Runs the exchange with the decode worker on which ``job`` is placed, and adds its tokens to ``answer``.

    The worker's updates are handled in the task that reads its stream. Only the end of the attempt wakes the task that
    awaits ``run``.
    """

    def __init__(
        self,
        dispatcher: AsyncDispatcher,
        job: Job,
        answer: AnswerState,
        *,
        max_prefill_failures: int,
        on_need_prefill: Callable[[decode_pb2.NeedPrefill.Reason], None] = lambda _: None,
        span: tracing.Span = tracing.OFF,
    ) -> None:
        self._on_need = on_need_prefill
        self._dispatcher = dispatcher
        self._job = job
        self._answer = answer
        self._max_prefill_failures = max_prefill_failures
        self._span = span
        self._stream: DecodeStream | None = None
        self._reserved = False
        self._placement: PlacementFuture | None = None
        self._prefill: Worker | None = None
        self._end: asyncio.Future[decode_pb2.DecodeDone | decode_pb2.Refused] = (
            asyncio.get_running_loop().create_future()
        )
        self._wanted_since = 0.0
        self._queued = 0.0  # seconds queued in the router, for both stages
        self._reservation_ns = 0

    async def run(
        self, connector: DecodeConnector, worker: WorkerInfo, start: decode_pb2.StartDecode
    ) -> decode_pb2.DecodeDone | decode_pb2.Refused:
        """Runs the attempt to its end and returns the worker's last message. Ends the sequence on the worker too.

        Raises:
            GaveUp: no prefill worker is available.
            OverfillError: the attempt failed.
        """
        self._stream = connector.open(worker, self._receive)
        try:
            # The worker compiles a grammar before it reserves blocks; no slot is held for that time.
            compiles = start.sampling.HasField("grammar")
            if not compiles and (prefill := self._dispatcher.prefill_with_start(self._job)) is not None:
                start.assign_prefill.CopyFrom(self._assignment(prefill))
            self._stream.send(decode_pb2.RouterMessage(start=start))
            self._queued = _now() - self._answer.received
            return await self._end
        finally:
            self._end.cancel()
            self._stream.close()

    def _receive(self, update: decode_pb2.SequenceUpdate | OverfillError) -> None:
        """Handles one update of the worker, or the error that ended the sequence."""
        if self._end.done():
            return
        if isinstance(update, OverfillError):
            if isinstance(update, Overloaded) and not self._reserved:
                self._end.set_result(decode_pb2.Refused(reason=str(update)))
            else:
                self._end.set_exception(update)
            return
        try:
            self._handle(update)
        except Exception as error:  # one sequence must not end the stream of all
            self._end.set_exception(error)

    def _handle(self, update: decode_pb2.SequenceUpdate) -> None:
        kind = update.WhichOneof("message")
        if kind == "tokens" and self._reserved:
            self._on_tokens(update.tokens)
        elif kind == "reserved" and not self._reserved:
            self._on_reserved(update.reserved)
        elif kind == "refused" and not self._reserved:
            self._end.set_result(update.refused)
        elif kind == "need_prefill" and self._reserved:
            self._on_need_prefill(update.need_prefill)
        elif kind == "done" and self._reserved:
            self._end.set_result(update.done)
        else:
            raise InternalError(f"the decode worker sent {kind or 'nothing'} out of turn")

    def _wait_for_slot(self, placement: PlacementFuture) -> None:
        """Sends AssignPrefill once ``placement`` has a prefill slot."""
        self._placement = placement
        placement.add_done_callback(self._on_placement)

    def _on_placement(self, placement: PlacementFuture) -> None:
        if placement.cancelled():
            return
        error = placement.exception()
        if self._end.done() or placement is not self._placement:
            return
        self._placement = None
        if isinstance(error, OverfillError):
            self._end.set_exception(GaveUp(error))
        else:
            self._assign(placement.result())

    def _assign(self, worker: Worker) -> None:
        assert self._stream is not None
        self._stream.send(decode_pb2.RouterMessage(assign_prefill=self._assignment(worker)))
        now = _now()
        self._queued += now - self._wanted_since
        self._wanted_since = now

    def _assignment(self, worker: Worker) -> decode_pb2.AssignPrefill:
        """Notes ``worker`` as the prefill worker and returns its assignment."""
        self._prefill = worker
        self._answer.prefill_worker = worker.id
        self._span.event("prefill worker assigned", worker=worker.id)
        return decode_pb2.AssignPrefill(
            worker_id=worker.id,
            incarnation=worker.info.incarnation,
            address=worker.info.address,
            data_addresses=worker.info.data_addresses,
        )

    def _on_reserved(self, reserved: decode_pb2.Reserved) -> None:
        self._reserved = True
        self._reservation_ns = reserved.reservation_ns
        self._answer.reservations += 1
        self._wanted_since = _now()
        if (placement := self._dispatcher.reserved(self._job)) is not None:
            self._wait_for_slot(placement)

    def _on_tokens(self, tokens: decode_pb2.Tokens) -> None:
        now = _now()
        if tokens.first_index == 0 and not self._answer.emitted:
            self._note_first_token(tokens)
        if self._answer.accept(tokens, now):
            self._answer.prefill_failures = 0
        self._dispatcher.prefill_done(self._job)

    def _note_first_token(self, tokens: decode_pb2.Tokens) -> None:
        timing = self._answer.timing
        timing.router_queue_ns = _nanoseconds(self._queued)
        timing.decode_reservation_ns = self._reservation_ns
        if tokens.HasField("prefill_queue_ns"):
            timing.prefill_queue_ns = tokens.prefill_queue_ns
        if tokens.HasField("prefill_compute_ns"):
            timing.prefill_compute_ns = tokens.prefill_compute_ns
        if tokens.HasField("return_ns"):
            timing.return_path_ns = tokens.return_ns

    def _on_need_prefill(self, need: decode_pb2.NeedPrefill) -> None:
        self._on_need(need.reason)
        if self._placement is not None:
            return  # the attempt already waits for a prefill slot
        failed = need.reason in (_Need.REASON_PREFILL_FAILED, _Need.REASON_INCOMPATIBLE)
        if failed:
            self._answer.prefill_failures += 1
            if self._answer.prefill_failures >= self._max_prefill_failures:
                raise GaveUp(self._prefill_error(need))
        tried = self._prefill if self._prefill and need.worker_id in ("", self._prefill.id) else None
        if self._answer.emitted:
            self._wanted_since = _now()
        # Before the first token, the time of a failed prefill counts as queueing.
        self._wait_for_slot(
            self._dispatcher.need_prefill(
                self._job,
                tried,
                failed=failed,
                pause=need.reason in (_Need.REASON_PREFILL_FAILED, _Need.REASON_PREFILL_REFUSED),
            )
        )

    def _prefill_error(self, need: decode_pb2.NeedPrefill) -> OverfillError:
        if need.reason == _Need.REASON_INCOMPATIBLE:
            return Incompatible(f"no prefill worker is compatible with the decode worker: {need.detail}")
        return Unavailable(
            f"gave up after {self._answer.prefill_failures} failed prefills; "
            f"{self._answer.progress}; the last failure: {need.detail or need.worker_id}"
        )


def _now() -> float:
    return asyncio.get_running_loop().time()


def _nanoseconds(seconds: float) -> int:
    return max(0, round(seconds * 1e9))

"""One attempt at one request: the exchange with one decode worker.

The router sends StartDecode, with a prefill worker if a slot is free; the worker answers Reserved or Refused. If
StartDecode had no prefill worker, the router then gets a slot and sends AssignPrefill. Then the worker sends Tokens and
DecodeDone. After Reserved, it may send NeedPrefill at any time. When the worker has the prompt's KV or receives it for
another sequence, Reserved says so, and the router gives the prefill slot back.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeAlias

from overfill.errors import Incompatible, InternalError, OverfillError, Overloaded, Unavailable
from overfill.routing.answer import AnswerState
from overfill.routing.async_dispatcher import AsyncDispatcher
from overfill.routing.job import Job
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


AttemptEnd: TypeAlias = "decode_pb2.DecodeDone | decode_pb2.Refused | Exception"
"""The worker's last message, or the error that ended the attempt.

An error that is neither an OverfillError nor GaveUp is a defect of the router.
"""

OnEnd = Callable[[AttemptEnd], None]
"""Receives the end of the attempt. Called once; it must not raise."""


class Attempt:
    """Runs the exchange with the decode worker on which ``job`` is placed, and adds its tokens to ``answer``.

    It has no task of its own: it handles the worker's updates in the task that reads the worker's stream.

    Args:
        on_end: called when the attempt has ended by itself. The sequence on the worker has ended too.
    """

    def __init__(
        self,
        dispatcher: AsyncDispatcher,
        job: Job,
        answer: AnswerState,
        on_end: OnEnd,
        *,
        max_prefill_failures: int,
        on_need_prefill: Callable[[decode_pb2.NeedPrefill.Reason], None],
        span: tracing.Span,
    ) -> None:
        self._on_end = on_end
        self._on_need = on_need_prefill
        self._dispatcher = dispatcher
        self._job = job
        self._answer = answer
        self._max_prefill_failures = max_prefill_failures
        self._span = span
        self._stream: DecodeStream | None = None
        self._number = 0  # of the sequence in the stream
        self._closed = False
        self._reserved = False
        self._waits_for_slot = False
        self._prefill: Worker | None = None
        self._assigned: dict[str, Worker] = {}  # every prefill worker assigned so far, by id
        self._wanted_since = 0.0
        self._queued = 0.0  # seconds queued in the router, for both stages
        self._reservation_ns = 0

    def start(self, connector: DecodeConnector, worker: WorkerInfo, command: decode_pb2.SequenceCommand) -> None:
        """Opens the sequence on ``worker`` and sends ``command``, which holds StartDecode."""
        try:
            self._stream, self._number = connector.open(worker, self._receive)
            if (prefill := self._dispatcher.prefill_with_start(self._job)) is not None:
                self._assign(prefill, command.start.assign_prefill)
            self._stream.send(self._number, command)
            self._queued = _now() - self._answer.received
        except Exception as error:
            self._end(error)

    def close(self) -> None:
        """Ends the attempt and its sequence on the worker, without a call of ``on_end``."""
        if not self._closed:
            self._closed = True
            if self._stream is not None:
                self._stream.close(self._number)

    def _end(self, result: AttemptEnd) -> None:
        if not self._closed:
            self.close()
            self._on_end(result)

    def _receive(self, update: decode_pb2.SequenceUpdate | OverfillError) -> None:
        """Handles one update of the worker, or the error that ended the sequence."""
        if self._closed:
            return
        if isinstance(update, OverfillError):
            refused = isinstance(update, Overloaded) and not self._reserved
            self._end(decode_pb2.Refused(reason=str(update)) if refused else update)
            return
        try:
            self._handle(update)
        except Exception as error:  # one sequence must not end the stream of all
            self._end(error)

    def _handle(self, update: decode_pb2.SequenceUpdate) -> None:
        kind = update.WhichOneof("message")
        if kind == "tokens" and self._reserved:
            self._on_tokens(update.tokens)
        elif kind == "reserved" and not self._reserved:
            self._on_reserved(update.reserved)
        elif kind == "refused" and not self._reserved:
            self._end(update.refused)
        elif kind == "need_prefill" and self._reserved:
            self._on_need_prefill(update.need_prefill)
        elif kind == "done" and self._reserved:
            self._check_writer(update.done)
            self._end(update.done)
        else:
            raise InternalError(f"the decode worker sent {kind or 'nothing'} out of turn")

    def _on_slot(self, outcome: Worker | OverfillError) -> None:
        """Sends AssignPrefill: the job has a prefill slot."""
        if self._closed:
            return  # the job's next call of the dispatcher releases the slot
        self._waits_for_slot = False
        try:
            self._send_assignment(outcome)
        except Exception as error:
            self._end(error)

    def _send_assignment(self, worker: Worker | OverfillError) -> None:
        if isinstance(worker, OverfillError):
            self._end(GaveUp(worker))
            return
        assert self._stream is not None
        command = decode_pb2.SequenceCommand()
        self._assign(worker, command.assign_prefill)
        self._stream.send(self._number, command)
        now = _now()
        self._queued += now - self._wanted_since
        self._wanted_since = now

    def _assign(self, worker: Worker, assignment: decode_pb2.AssignPrefill) -> None:
        """Notes ``worker`` as the prefill worker and fills in its assignment."""
        self._prefill = self._assigned[worker.id] = worker
        self._answer.prefill_worker = worker.id
        self._answer.prefill_engines[worker.id] = worker.info.engine
        self._span.event("prefill worker assigned", worker=worker.id)
        assignment.worker_id = worker.id
        assignment.incarnation = worker.info.incarnation
        assignment.address = worker.info.address
        assignment.data_addresses.extend(worker.info.data_addresses)
        expected = self._job.expected
        if expected.holder is not None:
            lender, holder = expected.holder.info, assignment.holder
            self._span.event("KV holder named", worker=lender.id, tokens=expected.holder_tokens)
            holder.worker_id, holder.incarnation, holder.address = lender.id, lender.incarnation, lender.address
            holder.data_addresses.extend(lender.data_addresses)
            holder.tokens = expected.holder_tokens

    def _on_reserved(self, reserved: decode_pb2.Reserved) -> None:
        self._reserved = True
        self._reservation_ns = reserved.reservation_ns
        self._answer.reservations += 1
        if reserved.has_prompt:  # the worker ignores an assignment
            self._prefill, self._answer.prefill_worker = None, ""
        self._wanted_since = _now()
        self._waits_for_slot = True
        if self._dispatcher.reserved(self._job, self._on_slot, has_prompt=reserved.has_prompt):
            self._waits_for_slot = False

    def _on_tokens(self, tokens: decode_pb2.Tokens) -> None:
        now = _now()
        if tokens.HasField("so_far"):
            self._check_writer(tokens.so_far)
        if tokens.first_index == 0 and not self._answer.emitted:
            self._note_first_token(tokens)
        if self._answer.accept(tokens, now):
            self._answer.prefill_failures = 0
        self._waits_for_slot = False
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
        if tokens.HasField("handoff_ns"):
            timing.handoff_ns = tokens.handoff_ns
        if tokens.HasField("first_step_ns"):
            timing.first_step_ns = tokens.first_step_ns

    def _on_need_prefill(self, need: decode_pb2.NeedPrefill) -> None:
        self._on_need(need.reason)
        if self._waits_for_slot:
            return
        failed = need.reason in (_Need.REASON_PREFILL_FAILED, _Need.REASON_INCOMPATIBLE)
        if failed:
            if need.step_failed and (refusal := self._answer.note_ended_worker(need.worker_id, need.detail)):
                raise GaveUp(refusal)
            self._answer.prefill_failures += 1
            if self._answer.prefill_failures >= self._max_prefill_failures:
                raise GaveUp(self._prefill_error(need))
        # When an assignment and a NeedPrefill cross, the worker has tried an earlier one than the latest.
        tried = self._assigned.get(need.worker_id) if need.worker_id else self._prefill
        if self._answer.emitted:
            self._wanted_since = _now()
        # Before the first token, the time of a failed prefill counts as queueing.
        self._waits_for_slot = True
        self._dispatcher.need_prefill(
            self._job,
            self._on_slot,
            tried,
            failed=failed,
            pause=need.reason in (_Need.REASON_PREFILL_FAILED, _Need.REASON_PREFILL_REFUSED),
        )

    def _check_writer(self, done: decode_pb2.DecodeDone) -> None:
        """Raises GaveUp unless the worker says that the request's adapter wrote the answer, or none if it has none."""
        asked, wrote = self._job.start.adapter_digest, done.adapter_digest
        if wrote != asked:
            said = f"the decode worker says that the adapter {wrote!r} wrote the answer; the request's is {asked!r}"
            raise GaveUp(Incompatible(said, ["adapter_digest"]))

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

"""One request across its attempts: the relay moves it from decode worker to decode worker until the answer is complete.

Token ids in, token ids out: this module knows no text, stop strings or clients. Emitted tokens are final. A later
attempt sends them to its worker, which continues after them.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextvars import Context, copy_context
from typing import Protocol, TypeVar

from overfill.errors import (
    DeadlineExceeded,
    Incompatible,
    InternalError,
    OverfillError,
    Overloaded,
    StepFailed,
    TransferFailed,
    Unavailable,
)
from overfill.routing.answer import AnswerState
from overfill.routing.async_dispatcher import AsyncDispatcher
from overfill.routing.attempt import Attempt, AttemptEnd, GaveUp
from overfill.routing.job import Job
from overfill.routing.stream import DecodeConnector
from overfill.routing.worker import Worker
from overfill.telemetry import tracing
from overfill.v1 import common_pb2, decode_pb2

T = TypeVar("T")

logger = logging.getLogger(__name__)

RETRIED = (Unavailable, InternalError, TransferFailed, Incompatible, Overloaded)
"""Errors after which the relay tries another decode worker. All other errors end the request."""

_MAX_LOSSES_FACTOR = 8
"""Multiple of ``max_attempts``: total number of lost workers after which a request is given up.

It stops a request that itself crashes the workers, without a report of theirs.
"""


class Observer(Protocol):
    """Receives the failures of a request's attempts, for metrics."""

    def attempt_failed(self, error: BaseException) -> None:
        """A decode worker failed the request."""

    def prefill_again(self, reason: decode_pb2.NeedPrefill.Reason) -> None:
        """A decode worker needs the prompt's KV again."""


class _NoObserver:
    def attempt_failed(self, error: BaseException) -> None: ...
    def prefill_again(self, reason: decode_pb2.NeedPrefill.Reason) -> None: ...


class Relay:
    """Runs one request, independent of how fast the caller reads.

    ::

        relay.start()
        try:
            while not isinstance(event := await relay.answer.next(), DecodeDone): ...
        finally:
            relay.close()

    It has no task: it acts when the dispatcher has placed the request, when an attempt has ended, and at the deadline.

    Args:
        request: the request, with its ``deadline`` on the event loop's clock.
        max_attempts: number of decode workers lost in a row, or of prefill failures in a row, after which the request
            is given up. A new token restarts both counts.
        observer: receives the failures of attempts.
        on_close: called once when the request has ended, before the caller has read all of its answer.

    Attributes:
        request: as the argument.
        answer: the answer so far. Its ``next`` raises DeadlineExceeded, Unavailable if too many workers were lost,
            InvalidRequest if the request has ended too many by failed steps, or a worker's error that another worker
            would repeat.
        decode_worker: id of the latest decode worker; empty before the first.
        decode_engine: its engine, for people; empty means unknown.
    """

    def __init__(
        self,
        request: Job,
        dispatcher: AsyncDispatcher,
        connector: DecodeConnector,
        *,
        max_attempts: int = 4,
        observer: Observer | None = None,
        on_close: Callable[[Relay], None] = lambda relay: None,
    ) -> None:
        self._on_close = on_close
        self.request = request
        self._dispatcher = dispatcher
        self._connector = connector
        self._max_attempts = max_attempts
        self._observer = observer or _NoObserver()
        emitted, scores = request.start.emitted_token_ids, request.num_scores
        decoder_first = request.start.HasField("answer_start")
        self.answer = AnswerState(
            emitted, request.max_tokens, request.received, request.writer, scores, decoder_first=decoder_first
        )
        self.decode_worker = ""
        self.decode_engine = ""
        self._loop = asyncio.get_running_loop()
        self._context = copy_context()  # of the request's task, so that logs and spans of later attempts belong to it
        self._parent = tracing.current()
        self._queue_span = self._attempt_span = tracing.OFF
        self._attempt: Attempt | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._closed = False
        self._opened = 0
        self._losses = 0  # lost workers in total
        self._losses_in_a_row = 0  # since the last new token
        self._known = request.emitted  # tokens of the answer when a worker was lost last

    @property
    def placed(self) -> bool:
        """True while the request is on a decode worker."""
        return self._attempt is not None

    def finish_at(self, completion_tokens: int) -> decode_pb2.DecodeDone:
        """Returns the end of an answer of which only the first ``completion_tokens`` count, after ``close``.

        The worker has not sent its last message, or has sent it for a longer answer. ``timing.decode_ns`` shrinks in
        proportion to the tokens that this worker computed.
        """
        finish = self.answer.ended or self._finish(self.answer.done(common_pb2.FINISH_REASON_STOP))
        timing, base = self.answer.timing, self.answer.decode_base
        computed = len(self.answer.emitted) - base
        if timing.HasField("decode_ns") and computed > 0:
            timing.decode_ns = timing.decode_ns * max(0, completion_tokens - base) // computed
        return finish

    def start(self) -> None:
        """Queues the request.

        Raises:
            PromptTooLong: no worker can ever hold the request.
            Overloaded: the queue is full.
        """
        if self.answer.full:
            self._conclude(self._finish(decode_pb2.DecodeDone(reason=common_pb2.FINISH_REASON_LENGTH)))
            return
        if self.request.deadline is not None:
            self._timer = self._loop.call_at(self.request.deadline, self._expire)
        self._queue_span = tracing.child("router.queue", parent=self._parent)
        try:
            self._dispatcher.submit(self.request, self._on_placed)
        except BaseException as error:
            self.close(error)
            raise

    def abort(self, error: OverfillError) -> None:
        """Ends the request with ``error``."""
        self._conclude(error)

    def close(self, error: BaseException | None = None) -> None:
        """Ends the request here and on the decode worker, and releases its slots.

        Args:
            error: reason, for traces, if the request is not answered.
        """
        if self._closed:
            return
        self._closed = True
        try:
            if self._timer is not None:
                self._timer.cancel()
            if self._attempt is not None:
                self._attempt.close()
                self._attempt = None
            self._queue_span.end(error)
            self._attempt_span.end(error)
        finally:
            self.request.emitted = len(self.answer.emitted)
            self._dispatcher.finish(self.request)
            self._on_close(self)

    def _conclude(self, end: decode_pb2.DecodeDone | OverfillError) -> None:
        self.answer.end(end)
        self.close(end if isinstance(end, OverfillError) else None)

    def _expire(self) -> None:
        self._conclude(DeadlineExceeded(f"the deadline passed; {self.answer.progress}"))

    def _guard(self, step: Callable[[T], None], argument: T) -> None:
        """Calls a step of the request. If it raises, the request ends; the caller may serve other requests too."""
        if self._closed:
            return
        try:
            step(argument)
        except Exception as error:
            # An empty context: the current one may be another request's.
            Context().run(logger.error, "request %s failed in the router", self.request.id, exc_info=error)
            self._conclude(InternalError(f"the router failed: {error}"))

    def _on_placed(self, outcome: Worker | OverfillError) -> None:
        """Opens an attempt on the worker. The caller is any request or report that made the placement possible."""
        self._guard(self._begin, outcome)

    def _on_end(self, result: AttemptEnd) -> None:
        """Ends the request or queues it again.

        The task that reads the worker's stream calls it, or ``Attempt`` itself when it cannot send.
        """
        self._attempt = None
        if isinstance(result, decode_pb2.DecodeDone | decode_pb2.Refused):
            self._guard(self._answered, result)
        else:
            self._loop.call_soon(self._guard, self._failed, result, context=self._context)

    def _begin(self, outcome: Worker | OverfillError) -> None:
        if isinstance(outcome, OverfillError):
            self._conclude(outcome)
        else:
            self._queue_span.end()
            self._open_attempt(outcome)

    def _open_attempt(self, worker: Worker) -> None:
        self._opened += 1
        self.decode_worker, self.decode_engine = worker.id, worker.info.engine
        self.answer.begin_attempt()
        self.answer.enter_tier(worker.info.tier if self.request.adapter is None else self.request.writer)
        span = self._attempt_span = tracing.child(
            "router.attempt", "client", self._parent, worker=worker.id, attempt=self._opened
        )
        self._attempt = Attempt(
            self._dispatcher,
            self.request,
            self.answer,
            self._on_end,
            max_prefill_failures=self._max_attempts,
            on_need_prefill=self._observer.prefill_again,
            span=span,
        )
        self._attempt.start(self._connector, worker.info, self._command(worker, span))

    def _command(self, worker: Worker, span: tracing.Span) -> decode_pb2.SequenceCommand:
        command = decode_pb2.SequenceCommand(start=self.request.start)
        start = command.start
        start.attempt = self._opened - 1
        start.expected_incarnation = worker.info.incarnation
        if len(self.answer.emitted) > len(start.emitted_token_ids):
            start.emitted_token_ids[:] = self.answer.emitted
        start.traceparent = span.traceparent or self._parent.traceparent
        if self.request.deadline is not None:
            start.time_left_ns = max(0, round((self.request.deadline - self._loop.time()) * 1e9))
        return command

    def _answered(self, result: decode_pb2.DecodeDone | decode_pb2.Refused) -> None:
        refused = isinstance(result, decode_pb2.Refused)
        self._attempt_span.set(refused=refused)
        self._attempt_span.end()
        if isinstance(result, decode_pb2.DecodeDone):
            self._conclude(self._finish(result))
            return
        self.request.emitted = len(self.answer.emitted)
        self._queue_span = tracing.child("router.queue", parent=self._parent)
        self._dispatcher.refused(self.request, self._on_placed, result.load if result.HasField("load") else None)

    def _failed(self, failure: Exception) -> None:
        """Queues the request for another decode worker, unless another one would fail it too.

        Raises ``failure`` if it is a defect of the router.
        """
        error = failure.error if isinstance(failure, GaveUp) else failure
        if not isinstance(error, OverfillError):
            raise error
        self._attempt_span.end(error)
        if isinstance(failure, GaveUp) or not isinstance(error, RETRIED):
            self._conclude(error)
            return
        logger.warning("request %s: decode worker %s failed: %s", self.request.id, self.decode_worker, error)
        self._observer.attempt_failed(error)
        emitted = len(self.answer.emitted)
        self._losses += 1
        self._losses_in_a_row = 1 if emitted > self._known else self._losses_in_a_row + 1
        self._known = emitted
        ended = isinstance(error, StepFailed)
        if self.answer.full:
            self._conclude(self._finish(self.answer.done(common_pb2.FINISH_REASON_LENGTH)))
        elif ended and (refusal := self.answer.note_ended_worker(self.decode_worker, str(error))):
            self._conclude(refusal)
        elif self._losses_in_a_row >= self._max_attempts or self._losses >= _MAX_LOSSES_FACTOR * self._max_attempts:
            progress = self.answer.progress
            gave_up = f"gave up after {self._losses} attempts; {progress}; the last failure: {error}"
            self._conclude(Unavailable(gave_up))
        else:
            self.request.emitted = emitted
            self._queue_span = tracing.child("router.queue", parent=self._parent)
            self._dispatcher.lost(self.request, self._on_placed, gone=ended or isinstance(error, Unavailable))

    def _finish(self, done: decode_pb2.DecodeDone) -> decode_pb2.DecodeDone:
        timing = self.answer.timing
        if done.HasField("handoff_exposed_ns"):
            timing.handoff_exposed_ns = done.handoff_exposed_ns
        if done.HasField("decode_ns"):
            timing.decode_ns = done.decode_ns
        # When an assignment and a NeedPrefill cross, only the worker knows which assignment it used.
        self.answer.prefill_worker = done.prefill_worker_id or self.answer.prefill_worker
        end = decode_pb2.DecodeDone()
        end.CopyFrom(done)  # a reference would keep the whole WorkerMessage
        self.answer.note_usage(done)
        end.usage.CopyFrom(self.answer.cached)
        end.usage.prompt_tokens, end.usage.completion_tokens = self.request.prompt_tokens, len(self.answer.emitted)
        return end

"""One attempt at one request: the exchange with one decode worker.

The router sends Start; the worker answers Reserved or Refused. The router gets a prefill slot and sends AssignPrefill.
Then the worker sends Tokens and Done. After Reserved, it may send NeedPrefill at any time.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from overfill.errors import Incompatible, InternalError, OverfillError, Overloaded, Unavailable
from overfill.routing.answer import AnswerState
from overfill.routing.async_dispatcher import AsyncDispatcher, PlacementFuture
from overfill.routing.dispatcher import Job
from overfill.routing.stream import DecodeStream
from overfill.routing.worker import Worker
from overfill.telemetry import tracing
from overfill.v1 import decode_pb2

_Need = decode_pb2.NeedPrefill


class GaveUp(Exception):
    """Ends the request with ``error``, without another attempt."""

    def __init__(self, error: OverfillError) -> None:
        super().__init__(str(error))
        self.error = error


class Attempt:
    """Runs the exchange with the decode worker on which ``job`` is placed, and adds its tokens to ``answer``."""

    def __init__(
        self,
        stream: DecodeStream,
        dispatcher: AsyncDispatcher,
        job: Job,
        answer: AnswerState,
        *,
        max_prefill_failures: int,
        on_need_prefill: Callable[[decode_pb2.NeedPrefill.Reason], None] = lambda _: None,
    ) -> None:
        self._on_need = on_need_prefill
        self._stream = stream
        self._dispatcher = dispatcher
        self._job = job
        self._answer = answer
        self._max_prefill_failures = max_prefill_failures
        self._reserved = False
        self._placement: PlacementFuture | None = None
        self._prefill: Worker | None = None
        self._receiving: asyncio.Task[decode_pb2.DecodeResponse | None] | None = None
        self._wanted_since = 0.0
        self._queued = 0.0  # seconds queued in the router, for both stages
        self._reservation_ns = 0

    async def run(self, start: decode_pb2.StartDecode) -> decode_pb2.DecodeDone | decode_pb2.Refused:
        """Runs the attempt to its end and returns the worker's last message.

        Raises:
            GaveUp: no prefill worker is available.
            OverfillError: the attempt failed.
        """
        await self._stream.send(decode_pb2.DecodeRequest(start=start))
        self._queued = _now() - self._answer.received
        try:
            first = await self._stream.receive()
        except Overloaded as error:
            return decode_pb2.Refused(reason=str(error))
        if first is not None and first.HasField("refused"):
            return first.refused
        self._on_reserved(first)
        while True:
            message = await self._next()
            kind = message.WhichOneof("message")
            if kind == "tokens":
                self._on_tokens(message.tokens)
            elif kind == "need_prefill":
                self._on_need_prefill(message.need_prefill)
            elif kind == "done":
                return message.done
            else:
                raise _unexpected(message)

    async def close(self) -> None:
        """Ends the exchange, on the worker's side too."""
        if self._receiving is not None:
            self._receiving.cancel()
            await asyncio.wait([self._receiving])
        self._stream.close()

    async def _next(self) -> decode_pb2.DecodeResponse:
        """Returns the worker's next message. Sends AssignPrefill first if a prefill slot becomes free before it."""
        while self._placement is not None:
            if self._receiving is None:
                self._receiving = asyncio.ensure_future(self._stream.receive())
            either: set[asyncio.Future[Any]] = {self._receiving, self._placement}
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if self._receiving.done():
                break
            await self._assign(self._placement)
        receiving, self._receiving = self._receiving, None
        message = await (receiving or self._stream.receive())
        if message is None:
            raise Unavailable("the decode worker ended the stream before the answer")
        return message

    async def _assign(self, placement: PlacementFuture) -> None:
        self._placement = None
        try:
            worker = placement.result()
        except OverfillError as error:
            raise GaveUp(error) from error
        self._prefill = worker
        self._answer.prefill_worker = worker.id
        target = decode_pb2.AssignPrefill(
            worker_id=worker.id,
            incarnation=worker.info.incarnation,
            address=worker.info.address,
            data_address=worker.info.data_address,
        )
        tracing.current().event("prefill worker assigned", worker=worker.id)
        await self._stream.send(decode_pb2.DecodeRequest(assign_prefill=target))
        now = _now()
        self._queued += now - self._wanted_since
        self._wanted_since = now

    def _on_reserved(self, message: decode_pb2.DecodeResponse | None) -> None:
        if message is None or not message.HasField("reserved"):
            raise _unexpected(message)
        self._reservation_ns = message.reserved.reservation_ns
        self._answer.reservations += 1
        self._wanted_since = _now()
        self._placement = self._dispatcher.reserved(self._job)

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
        self._placement = self._dispatcher.need_prefill(
            self._job,
            tried,
            failed=failed,
            pause=need.reason in (_Need.REASON_PREFILL_FAILED, _Need.REASON_PREFILL_REFUSED),
        )

    def _prefill_error(self, need: decode_pb2.NeedPrefill) -> OverfillError:
        if need.reason == _Need.REASON_INCOMPATIBLE:
            return Incompatible(f"no prefill worker is compatible with the decode worker: {need.detail}")
        return Unavailable(
            f"gave up after {self._answer.prefill_failures} failed prefills; "
            f"{self._answer.progress}; the last failure: {need.detail or need.worker_id}"
        )


def _unexpected(message: decode_pb2.DecodeResponse | None) -> OverfillError:
    if message is None:
        return Unavailable("the decode worker ended the stream before the answer")
    return InternalError(f"the decode worker sent {message.WhichOneof('message') or 'nothing'} out of turn")


def _now() -> float:
    return asyncio.get_running_loop().time()


def _nanoseconds(seconds: float) -> int:
    return max(0, round(seconds * 1e9))

"""One attempt at one request: the conversation with one decode worker.

Start; Reserved or Refused; a prefill slot, AssignPrefill; Tokens; Done. NeedPrefill at any time in between.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from overfill.errors import Incompatible, InternalError, OverfillError, Overloaded, Unavailable
from overfill.routing.answer import Answer
from overfill.routing.async_dispatcher import AsyncDispatcher, PlacementFuture
from overfill.routing.dispatcher import Job
from overfill.routing.stream import DecodeStream
from overfill.routing.worker import Worker
from overfill.telemetry import tracing
from overfill.v1 import decode_pb2

_Need = decode_pb2.NeedPrefill


class GaveUp(Exception):
    """The request ends with ``error``; another attempt would not help."""

    def __init__(self, error: OverfillError) -> None:
        super().__init__(str(error))
        self.error = error


class Attempt:
    """Talks to a decode worker on which ``job`` is placed, and adds what it says to ``answer``."""

    def __init__(
        self,
        stream: DecodeStream,
        dispatcher: AsyncDispatcher,
        job: Job,
        answer: Answer,
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
        self._queued = 0.0  # seconds in the router, in front of either stage
        self._reservation_ns = 0

    async def run(self, start: decode_pb2.StartDecode) -> decode_pb2.DecodeDone | decode_pb2.Refused:
        """The worker's last word.

        Raises:
            GaveUp: no prefill worker can be had.
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
        """Ends the conversation, on the worker's side too."""
        if self._receiving is not None:
            self._receiving.cancel()
            await asyncio.wait([self._receiving])
        self._stream.close()

    async def _next(self) -> decode_pb2.DecodeResponse:
        """The next message. While a prefill slot is awaited, whichever comes first is dealt with first."""
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
            return  # it gets the one that is awaited already
        failed = need.reason in (_Need.REASON_PREFILL_FAILED, _Need.REASON_INCOMPATIBLE)
        if failed:
            self._answer.prefill_failures += 1
            if self._answer.prefill_failures >= self._max_prefill_failures:
                raise GaveUp(self._prefill_error(need))
        tried = self._prefill if self._prefill and need.worker_id in ("", self._prefill.id) else None
        if self._answer.emitted:
            self._wanted_since = _now()
        # Otherwise what a failed prefill took counts as waiting for one.
        self._placement = self._dispatcher.need_prefill(
            self._job,
            tried,
            failed=failed,
            pause=need.reason in (_Need.REASON_PREFILL_FAILED, _Need.REASON_PREFILL_REFUSED),
        )

    def _prefill_error(self, need: decode_pb2.NeedPrefill) -> OverfillError:
        if need.reason == _Need.REASON_INCOMPATIBLE:
            return Incompatible(f"no prefill worker fits the decode worker: {need.detail}")
        return Unavailable(
            f"gave up after {self._answer.prefill_failures} failed prefills; "
            f"{self._answer.progress}; the last: {need.detail or need.worker_id}"
        )


def _unexpected(message: decode_pb2.DecodeResponse | None) -> OverfillError:
    if message is None:
        return Unavailable("the decode worker ended the stream before the answer")
    return InternalError(f"the decode worker sent {message.WhichOneof('message') or 'nothing'} out of turn")


def _now() -> float:
    return asyncio.get_running_loop().time()


def _nanoseconds(seconds: float) -> int:
    return max(0, round(seconds * 1e9))

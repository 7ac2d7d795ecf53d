"""One running answer in the router: its tokens as text, its statistics, its end."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import TracebackType
from typing import Self

from overfill.api.answer_text import AnswerText
from overfill.errors import OverfillError, RequestCancelled
from overfill.routing.answer import AnswerDelta
from overfill.routing.relay import Relay
from overfill.routing.tier import TierChoice
from overfill.telemetry import logs, tracing
from overfill.telemetry.outcomes import outcome_of
from overfill.v1 import common_pb2, decode_pb2, inference_pb2
from services.router.pace import Pace
from services.router.statistics import Statistics


class RunningAnswer:
    """One running answer. Call ``next`` until it returns None, within ``with``; then read ``finished``.

    Args:
        relay: the request on its way through the workers.
        text: what turns its tokens into text.
        statistics: counts the answer.
        on_read: called with the event loop's time when the client has a delta.
        close: ends the relay; called with it and with the reason if the request is not answered, else None.

    Attributes:
        accepted: first message to the client.
        rest: text held back until the end, because it might have been part of a stop string; ``finished`` has it too.
    """

    def __init__(
        self,
        relay: Relay,
        text: AnswerText,
        accepted: inference_pb2.Accepted,
        statistics: Statistics,
        pace: Pace,
        *,
        on_read: Callable[[float], None],
        close: Callable[[Relay, BaseException | None], None],
    ) -> None:
        self.accepted = accepted
        self._failure: BaseException | None = RequestCancelled("the answer was not read to its end")
        self._now = asyncio.get_running_loop().time
        self._statistics = statistics
        self._pace = pace
        self._on_read = on_read
        self._close = close
        self._relay = relay
        self._text = text
        self._delta_in_delivery: AnswerDelta | None = None  # the delta that the caller is handing to the client
        self._handed_at: float | None = None  # time when the previous tokens had been handed to the client
        self._ttft_ns: int | None = None
        self.rest: AnswerDelta | None = None
        self._finished: inference_pb2.Finished | None = None

    @property
    def finished(self) -> inference_pb2.Finished:
        """The end of the answer; available after the last delta."""
        assert self._finished is not None
        return self._finished

    @property
    def choice(self) -> TierChoice:
        """What writes the answer, as it was accepted."""
        return self._relay.request.choice

    @property
    def cached_tokens(self) -> int:
        """Number of prompt tokens that were in a prefix cache, as far as it is known: with the first token or later."""
        return self._relay.answer.cached_tokens

    @property
    def complete(self) -> bool:
        """True if the answer has ended well and all its tokens have been returned: ``next`` returns None at once."""
        return self._text.stop is not None or self._relay.answer.complete

    async def next(self) -> AnswerDelta | None:
        """Waits for new tokens and returns all that have arrived, or None at the end of the answer.

        There are at least as many as the request's ``stream_interval``. The first token and the last tokens are
        returned at once. A call tells that the client has the previous delta.

        Raises:
            OverfillError: the answer failed; all its tokens have been returned.
        """
        if self._delta_in_delivery is not None:
            self._count(self._delta_in_delivery)
            self._delta_in_delivery = None
        if self._text.stop is not None:
            self._finish(None)
            return None
        answer, pace = self._relay.answer, self._pace
        first = self._handed_at is None
        delta: AnswerDelta | None = None
        while True:
            try:
                event = await answer.next()
            except OverfillError as error:
                if delta is not None:
                    break  # the next call raises the error
                self._failure = error
                raise
            if not isinstance(event, AnswerDelta):
                if delta is not None:
                    break  # the next call returns None
                self._finish(event)
                return None
            part = self._text.push(event)
            if delta is None:
                delta = part
            else:
                delta.extend(part)
            if self._text.stop is not None:
                # Stop the worker now, before the client has read this delta.
                self._relay.close()
                break
            if first:
                break
            if pace.paused:
                await pace.resumed()
            if len(delta.token_ids) >= self._relay.request.stream_interval and not answer.unread:
                break
        pace.writing()
        self._delta_in_delivery = delta
        return delta

    def _count(self, handed: AnswerDelta) -> None:
        last, relay = self._handed_at, self._relay
        now = self._handed_at = self._now()
        self._on_read(now)
        since_last = None if last is None else now - last
        self._statistics.tokens(relay.request, len(handed.token_ids), now, since_last)
        # An answer that a client resumes has its first token already, so it has no TTFT.
        if last is None and not relay.request.client_resumed:
            self._ttft_ns = _nanoseconds_since(relay.answer.received)
            tracing.current().event("first token")
            if relay.answer.timing.HasField("return_path_ns"):
                relay.answer.timing.return_path_ns += _nanoseconds_since(relay.answer.first_token_at)

    def _finish(self, end: decode_pb2.DecodeDone | None) -> None:
        relay, text = self._relay, self._text
        if end is not None:
            self.rest = text.finish()
        relay.close()
        self._finished = _finished(relay, text, self.rest, end, self._ttft_ns)
        self._failure = None
        tracing.current().set(completion_tokens=text.num_tokens, migrations=self._finished.migrations)
        self._statistics.answered(
            relay.request, self._finished, asyncio.get_running_loop().time(), relay.answer.decode_base
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._close(self._relay, self._failure)
        self._statistics.ended(self._relay.request, self._failure)
        self._log()

    def _log(self) -> None:
        relay = self._relay
        ttft_ns = self._ttft_ns
        if ttft_ns is None and self._delta_in_delivery is not None and not relay.request.client_resumed:
            ttft_ns = _nanoseconds_since(relay.answer.received)  # the client left while the first token was on its way
        logs.ended(
            "router",
            outcome_of(self._failure),
            request_id=relay.request.id,
            prompt_tokens=relay.request.prompt_tokens,
            completion_tokens=self._text.num_tokens,
            ttft=(ttft_ns or 0) / 1e9,
            total=_nanoseconds_since(relay.answer.received) / 1e9,
            prefill_worker=relay.answer.prefill_worker,
            decode_worker=relay.decode_worker,
            migrations=relay.answer.migrations,
            tier=relay.request.writer,
        )


def _finished(
    relay: Relay, text: AnswerText, rest: AnswerDelta | None, end: decode_pb2.DecodeDone | None, ttft_ns: int | None
) -> inference_pb2.Finished:
    if end is None:  # a stop string ended the answer before the worker did
        end = relay.finish_at(text.num_tokens)
    parts = relay.answer.parts or [
        inference_pb2.AnswerPart(tier=relay.request.writer, first_index=len(relay.answer.emitted))
    ]
    if text.stop is not None:
        # The client gets no tokens behind the stop string, so it does not matter which tier wrote them.
        parts = parts[:1] + [part for part in parts[1:] if part.first_index < text.num_tokens]
    reason = end.reason if text.stop is None else common_pb2.FINISH_REASON_STOP
    if reason == common_pb2.FINISH_REASON_STOP and text.called_tools:
        reason = common_pb2.FINISH_REASON_TOOL_CALLS
    finished = inference_pb2.Finished(
        reason=reason,
        usage=end.usage,
        timing=relay.answer.timing,
        prefill_worker=relay.answer.prefill_worker,
        decode_worker=relay.decode_worker,
        migrations=relay.answer.migrations,
        stop=text.stop or "",
        rest=None if rest is None else rest.to_proto(),
        trace=end.trace if end.HasField("trace") else None,
        codec=end.codec,
        prefill_engine=relay.answer.prefill_engine,
        decode_engine=relay.decode_engine,
        parts=parts,
    )
    finished.usage.completion_tokens, finished.usage.reasoning_tokens = text.num_tokens, text.reasoning_tokens
    if ttft_ns is not None:
        finished.timing.ttft_ns = ttft_ns
    finished.timing.total_ns = _nanoseconds_since(relay.answer.received)
    return finished


def _nanoseconds_since(then: float) -> int:
    return round((asyncio.get_running_loop().time() - then) * 1e9)

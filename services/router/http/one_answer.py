"""Runs a request for one answer, in the form of any API, from its first event to the last byte of the response."""

from __future__ import annotations

import asyncio
from types import TracebackType
from typing import Self

from overfill.api.openai.errors import from_error
from overfill.api.translation import AnswerWriter, OwnField
from overfill.routing.answer import AnswerDelta, joined
from overfill.rpc.status import as_overfill_error
from overfill.telemetry.tracing import Span
from services.router.http.generate import STREAM_HEADERS
from services.router.http.request import Headers, Request
from services.router.running_answer import RunningAnswer

PING_INTERVAL = 10.0
"""Seconds of silence after which a stream gets an event that says nothing."""


class OneAnswer:
    """One answer on its way to its client. The context manager ends its span.

    Args:
        answer: runs; callers end it.
        writer: writes it.
        own_field: names the client's fields in the errors of a stream.
        headers: of the response, without the content type of a stream.
        span: of the request.
    """

    def __init__(
        self,
        answer: RunningAnswer,
        writer: AnswerWriter,
        own_field: OwnField,
        request: Request,
        headers: Headers,
        span: Span,
    ) -> None:
        self._answer = answer
        self._writer = writer
        self._own_field = own_field
        self._request = request
        self._headers = headers
        self._span = span
        self._failure: BaseException | None = None  # one that the stream has told
        self._wrote = False  # since the last look for a silence

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._span.end(self._failure or exc)
        self._failure = None  # its traceback refers to this object

    async def whole(self) -> bytes:
        """Waits for the whole answer and returns the response's body.

        Raises:
            OverfillError: the answer failed.
        """
        answer, writer = self._answer, self._writer
        parts: list[AnswerDelta] = []
        while (delta := await answer.next()) is not None:
            parts.append(delta)
        if answer.rest is not None:
            parts.append(answer.rest)
        writer.begin(answer.accepted, answer.cached_tokens)
        writer.delta(joined(parts))
        return writer.whole(answer.finished)

    async def stream(self) -> None:
        """Writes the answer as server-sent events, from its first token or the first silence on.

        Raises:
            OverfillError: the answer failed before the first event. Later errors become an event.
        """
        answer, writer, request = self._answer, self._writer, self._request
        self._look_for_silence(first=True)
        events = b""
        try:
            while (delta := await answer.next()) is not None:
                events += self._begin() + writer.delta(delta)
                if events and not answer.complete:  # else it leaves with the end
                    self._wrote = True
                    request.write(events)
                    events = b""
                    if request.writes_wait:
                        await request.writable()
            events += self._begin()
            if answer.rest is not None:
                events += writer.delta(answer.rest)
            request.write(events + writer.end(answer.finished), last=True)
        except Exception as error:
            if request.status is None:
                raise
            self._failure = error
            failure = from_error(self._own_field(as_overfill_error(error)))
            request.write(events + writer.fail(failure), last=True)
        finally:
            self._timer.cancel()

    def _begin(self) -> bytes:
        if self._request.status is not None:
            return b""
        self._request.begin(200, (*STREAM_HEADERS, *self._headers))
        return self._writer.begin(self._answer.accepted, self._answer.cached_tokens)

    def _look_for_silence(self, *, first: bool = False) -> None:
        if not first and not self._wrote and not self._request.writes_wait:
            self._request.write(self._begin() or self._writer.ping())
        self._wrote = False
        self._timer = asyncio.get_running_loop().call_later(PING_INTERVAL, self._look_for_silence)

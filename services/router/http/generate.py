"""Runs one generating request of the OpenAI API, from its choices to the last byte of the response."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import ExitStack
from functools import cached_property
from typing import Any

from starlette.types import Receive, Scope, Send

from overfill.api.keys import ApiKey
from overfill.api.openai import answers
from overfill.api.openai.answers import Choice, Envelope, EventFrame
from overfill.api.openai.errors import from_error
from overfill.api.openai.wire import ApiRequest
from overfill.errors import OverfillError
from overfill.routing.answer import AnswerDelta
from overfill.rpc.status import as_overfill_error
from overfill.telemetry.tracing import Span
from services.router.http.connection import ClientGone, Connection
from services.router.request_handler import RequestHandler, choices
from services.router.running_answer import RunningAnswer

Write = Callable[[bytes, bool], Awaitable[None]]
"""Writes events to the client; the second argument tells whether more follow."""


class RunningChoices:
    """The running choices of one request.

    Args:
        envelope: makes the response's envelope for the tier that begins its first choice.
    """

    def __init__(
        self,
        handler: RequestHandler,
        asked: ApiRequest,
        envelope: Callable[[str], Envelope],
        key: ApiKey | None,
        span: Span,
    ) -> None:
        self._span = span
        self._handler = handler
        self._asked = asked
        self._make_envelope = envelope
        self._key = key
        self._stack = ExitStack()
        self.choices: list[Choice] = []
        self._running: list[RunningAnswer] = []
        self._failure: BaseException | None = None

    async def start(self, received: float) -> None:
        """Queues every choice. If it raises ApiError or OverfillError, no choice runs."""
        asked, handler = self._asked, self._handler
        try:
            total = len(asked.prompts) * asked.n
            with handler.reserve(self._key, total) as reservation:
                checked = [await handler.check(request, reservation) for request in asked.prompts]
                for prompt, request in enumerate(checked):
                    for each in choices(request, asked.n):
                        if self._running:
                            await asyncio.sleep(0)  # copying a long prompt for each answer delays other streams
                        answer = handler.start(each, reservation, received, None)
                        self._running.append(self._stack.enter_context(answer))
                        self.choices.append(self._choice(prompt, answer))
        except BaseException as error:
            self._failure = error
            self.close()
            self._raise_named(error)
            raise

    @cached_property
    def _envelope(self) -> Envelope:
        return self._make_envelope(self._running[0].accepted.tier)

    def _raise_named(self, error: BaseException) -> None:
        """Raises an error about the grammar again, with the grammar's field as the client named it."""
        if isinstance(error, OverfillError) and (named := self._asked.with_grammar_field(error)) is not error:
            raise named from error

    def _choice(self, prompt: int, answer: RunningAnswer) -> Choice:
        return Choice(
            index=len(self.choices),
            envelope=self._envelope,
            seed=answer.accepted.seed,
            prompt_tokens=answer.accepted.prompt_tokens,
            logprobs=self._asked.prompts[prompt].sampling.HasField("logprobs"),
            brownout_from=answer.accepted.brownout_from,
            echo=self._echo(prompt),
        )

    async def whole(self) -> dict[str, Any]:
        """Waits until every choice is complete; returns the response. Raises OverfillError."""
        await self._run_all(self._collect)
        return self._envelope.wrap(
            [choice.whole() for choice in self.choices],
            chunk=False,
            usage=answers.usage(self.choices, self._asked.n),
            overfill=self._envelope.extension(self.choices),
        )

    async def stream(self, write: Write) -> None:
        """Writes the response as server-sent events, each choice's as soon as it has them. Raises OverfillError."""
        await self._run_all(lambda choice, answer: self._send(choice, answer, write))

    async def _run_all(self, run: Callable[[Choice, RunningAnswer], Coroutine[Any, Any, None]]) -> None:
        """Runs all choices at once. If one fails, cancels the others and raises its error."""
        try:
            if len(self._running) == 1:
                await run(self.choices[0], self._running[0])
                return
            tasks = [
                asyncio.ensure_future(run(choice, answer))
                for choice, answer in zip(self.choices, self._running, strict=True)
            ]
            try:
                await asyncio.gather(*tasks)
            finally:
                for task in tasks:
                    task.cancel()
        except BaseException as error:
            self._failure = error
            self._raise_named(error)
            raise

    async def _collect(self, choice: Choice, answer: RunningAnswer) -> None:
        while (delta := await answer.next()) is not None:
            choice.add(delta)
        if answer.rest is not None:
            choice.add(answer.rest)
        choice.finished = answer.finished

    async def _send(self, choice: Choice, answer: RunningAnswer, write: Write) -> None:
        frame = None if self._asked.continuous_usage else EventFrame(self._chunk(choice.text(EventFrame.MARK)))
        delta = await answer.next()
        events = self._event(choice.first())
        while delta is not None:
            events += self._delta(choice, delta, frame)
            if events and not answer.complete:
                await write(events, True)
                events = b""
            delta = await answer.next()
        if answer.rest is not None:
            events += self._delta(choice, answer.rest, frame)
        choice.finished = answer.finished
        events += self._event(choice.last(), overfill=self._envelope.extension([choice]))
        more = any(choice.finished is None for choice in self.choices)
        await write(events if more else events + self._end(), more)

    def _delta(self, choice: Choice, delta: AnswerDelta, frame: EventFrame | None) -> bytes:
        """Returns the event for ``delta``; empty if the client would see nothing new, as inside a character."""
        if frame is not None and choice.only_text(delta):
            return frame.event(delta.text)
        return self._event(choice.chunk(delta))

    def _end(self) -> bytes:
        """Returns the events after the last choice."""
        if not self._asked.include_usage:
            return answers.DONE
        total = answers.usage(self.choices, self._asked.n)
        return answers.event(self._envelope.wrap([], chunk=True, usage=total)) + answers.DONE

    def close(self) -> None:
        """Ends the choices that still run."""
        try:
            self._stack.close()
        finally:
            self._span.end(self._failure)

    def _event(self, choice: dict[str, Any] | None, **more: Any) -> bytes:
        return b"" if choice is None else answers.event(self._chunk(choice, **more))

    def _chunk(self, choice: dict[str, Any], **more: Any) -> dict[str, Any]:
        if self._asked.continuous_usage:
            more["usage"] = answers.usage(self.choices, self._asked.n)
        elif self._asked.include_usage:
            more["usage"] = None
        return self._envelope.wrap([choice], chunk=True, **more)

    def _echo(self, prompt: int) -> str:
        if self._asked.echo is None:
            return ""
        text = self._asked.echo[prompt]
        return text if isinstance(text, str) else self._handler.tokenizer.decode(list(text))


_STREAM_HEADERS = (
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
    (b"content-type", b"text/event-stream; charset=utf-8"),
)


class EventStream:
    """Streams the choices. An error before the first event is raised, so that it becomes the response's status."""

    def __init__(self, answers: RunningChoices, request_id: str) -> None:
        self._answers = answers
        self._headers = [*_STREAM_HEADERS, (b"x-request-id", request_id.encode("latin-1"))]
        self._started = False
        self._sending = asyncio.Lock()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        connection: Connection = scope["overfill.connection"]

        async def write(events: bytes, more: bool) -> None:
            if more and connection.write_at_once(events):
                return
            async with self._sending:  # the end of the response must not overtake another choice's events
                if not self._started:
                    self._started = True
                    with connection.one_write():
                        await send({"type": "http.response.start", "status": 200, "headers": self._headers})
                        await send({"type": "http.response.body", "body": events, "more_body": more})
                else:
                    await send({"type": "http.response.body", "body": events, "more_body": more})

        try:
            with connection:
                await self._stream(write)
        except ClientGone:
            if not self._started:
                raise
        finally:
            self._answers.close()

    async def _stream(self, write: Write) -> None:
        try:
            await self._answers.stream(write)
        except Exception as error:
            if not self._started:
                raise
            await write(answers.event(from_error(as_overfill_error(error)).body), False)

"""Runs one request for chat completions or completions, from its choices to the last byte of the response."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import ExitStack
from functools import cached_property
from typing import Any, Self

from overfill.api.openai import answers
from overfill.api.openai.answers import Choice, Envelope, EventFrame
from overfill.api.openai.errors import from_error
from overfill.api.openai.translate import ApiRequest
from overfill.errors import InvalidRequest
from overfill.routing.answer import AnswerDelta
from overfill.routing.job import Job
from overfill.routing.tier import TierChoice
from overfill.rpc.status import as_overfill_error
from overfill.telemetry.tracing import Span
from services.router.http.request import Headers, Request
from services.router.quota_hold import QuotaHold
from services.router.request_handler import RequestHandler
from services.router.running_answer import RunningAnswer

STREAM_HEADERS = (
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
    (b"content-type", b"text/event-stream; charset=utf-8"),
)


MAX_UNSTREAMED_LOGPROBS = 1 << 21
"""Log-probabilities of one response that is not streamed: each token has 1 and those of its alternatives.

The router keeps them until all answers are complete, some 50 MiB.
"""

_SHORT = 16 << 10
"""Size in bytes up to which a message with log-probabilities is encoded at once."""

_PART = 256 << 10
"""Size in bytes from which on a response leaves in parts."""


class RunningChoices:
    """The running choices of one request. Their context manager ends those that still run.

    Args:
        asked: what the client asks for.
        envelope: makes the response's envelope for what begins to write its first choice.
        span: ends with the choices.
        encoding: held while a piece of many log-probabilities is encoded, so that all requests together delay other
            tasks by one piece at a time.
    """

    def __init__(
        self,
        handler: RequestHandler,
        asked: ApiRequest,
        envelope: Callable[[TierChoice], Envelope],
        span: Span,
        encoding: asyncio.Lock,
    ) -> None:
        self._asked = asked
        self._span = span
        self._handler = handler
        self._make_envelope = envelope
        self._encoding = encoding
        self._logprobs = 0  # those of answers that are not streamed
        self._stack = ExitStack()
        self.choices: list[Choice] = []
        self._running: list[RunningAnswer] = []
        self._failure: BaseException | None = None

    async def start(self, received: float, hold: QuotaHold) -> None:
        """Queues every choice. If it raises ApiError or OverfillError, no choice runs."""
        asked, handler = self._asked, self._handler
        try:
            hold.take(received, len(asked.prompts) * asked.n)
            checked = [await handler.check(request, hold, received) for request in asked.prompts]
            _check_response_scores(checked)
            for prompt, request in enumerate(checked):
                for index in range(asked.n):
                    if self._running:
                        await asyncio.sleep(0)  # copying a long prompt for each answer delays other streams
                    answer = handler.start(request if asked.n == 1 else request.sample(index), hold)
                    self._running.append(self._stack.enter_context(answer))
                    self.choices.append(self._choice(prompt, request, answer))
        except BaseException as error:
            self._failure = error
            self.close()
            raise

    @cached_property
    def _envelope(self) -> Envelope:
        return self._make_envelope(self._running[0].choice)

    def _choice(self, prompt: int, request: Job, answer: RunningAnswer) -> Choice:
        asked = self._asked
        return Choice(
            index=len(self.choices),
            envelope=self._envelope,
            seed=answer.accepted.seed,
            prompt_tokens=answer.accepted.prompt_tokens,
            logprobs=asked.prompts[prompt].sampling.HasField("logprobs"),
            brownout_from=answer.accepted.brownout_from,
            echo=self._echo(prompt),
            prompt=request.prompt_token_ids if asked.echoes_scores or asked.prompt_logprobs else (),
            prompt_logprobs=asked.prompt_logprobs,
            without_answer=asked.without_answer,
            include_reasoning=asked.include_reasoning,
        )

    async def whole(self, request: Request, headers: Headers) -> bytes:
        """Waits until every choice is complete, and begins to write the response if it is long.

        Returns:
            What remains to be written.

        Raises:
            OverfillError: an answer failed.
        """
        await self._run_all(self._collect)
        of_chat = self._asked.prompt_logprobs and self._envelope.kind == "chat"
        message = self._envelope.wrap(
            [choice.whole() for choice in self.choices],
            chunk=False,
            **({"prompt_logprobs": answers.MARK} if of_chat else {}),
            usage=answers.usage(self.choices, self._asked.n),
            overfill=self._envelope.extension(self.choices),
        )
        pieces = answers.pieces(message, [scores for choice in self.choices for scores in choice.whole_scores()])
        part, size = bytearray(), 0
        while (piece := await self._next(pieces, size)) is not None:
            part += piece
            size += len(piece)
            if len(part) >= _PART:
                if request.status is None:
                    request.begin(200, headers)
                request.write(bytes(part))
                part.clear()
                if request.writes_wait:
                    await request.writable()
        return bytes(part)

    async def _next(self, pieces: Iterator[bytes], size: int) -> bytes | None:
        """Returns the next piece of a message, of which ``size`` bytes are known; None at its end.

        Encodes the pieces of long messages one after the other, and lets other tasks run in between.
        """
        if size < _SHORT:
            return next(pieces, None)
        async with self._encoding:
            await asyncio.sleep(0)
            return next(pieces, None)

    async def stream(self, request: Request, headers: Headers) -> None:
        """Writes the response as server-sent events, each choice's as soon as it has them.

        Raises:
            OverfillError: an answer failed before the first event. Later errors become an event.
        """
        request_headers = (*STREAM_HEADERS, *headers)

        async def send(choice: Choice, answer: RunningAnswer) -> None:
            await self._send(choice, answer, request, request_headers)

        try:
            await self._run_all(send)
        except Exception as error:
            if request.status is None:
                raise
            failure = from_error(self._asked.own_field(as_overfill_error(error)))
            request.write(answers.event(failure.body), last=True)

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
            raise

    async def _collect(self, choice: Choice, answer: RunningAnswer) -> None:
        while (delta := await answer.next()) is not None:
            choice.add(delta)
            self._logprobs += len(delta.logprobs) + sum(len(entry.top_ids) for entry in delta.logprobs)
            if (scores := delta.prompt_logprobs) is not None:
                self._logprobs += len(scores.logprobs) + len(scores.top_logprobs)
            if self._logprobs > MAX_UNSTREAMED_LOGPROBS:
                raise InvalidRequest(
                    "sampling.logprobs",
                    f"are too many in this response: more than {MAX_UNSTREAMED_LOGPROBS}, those of alternatives "
                    "included; ask for a stream, for fewer answers, or for fewer alternatives",
                )
        if answer.rest is not None:
            choice.add(answer.rest)
        choice.finished = answer.finished

    async def _send(self, choice: Choice, answer: RunningAnswer, request: Request, headers: Headers) -> None:
        frame = None if self._asked.continuous_usage else EventFrame(self._chunk(choice.text(answers.MARK)))
        delta = await answer.next()
        choice.cached_tokens = answer.cached_tokens
        if request.status is None:
            request.begin(200, headers)
        events = self._event(choice.first())
        while delta is not None:
            events += await self._scored(choice, delta) if choice.logprobs else self._delta(choice, delta, frame)
            if events and not answer.complete:
                request.write(events)
                events = b""
                if request.writes_wait:
                    await request.writable()
            delta = await answer.next()
        if answer.rest is not None:
            rest = answer.rest
            events += await self._scored(choice, rest) if choice.logprobs else self._delta(choice, rest, frame)
        choice.finished = answer.finished
        events += self._event(choice.last(), overfill=self._envelope.extension([choice]))
        last = all(choice.finished is not None for choice in self.choices)
        request.write(events + self._end() if last else events, last=last)

    def _delta(self, choice: Choice, delta: AnswerDelta, frame: EventFrame | None) -> bytes:
        """Returns the event for ``delta``; empty if the client would see nothing new, as inside a character."""
        if frame is not None and choice.only_text(delta):
            return frame.event(delta.text)
        return self._event(choice.chunk(delta))

    async def _scored(self, choice: Choice, delta: AnswerDelta) -> bytes:
        """Returns the event for ``delta`` of a choice with log-probabilities; empty as for ``_delta``."""
        chunk = choice.chunk(delta)
        if chunk is None:
            return b""
        pieces = answers.pieces(self._chunk(chunk), [choice.scores(delta)])
        event = bytearray(b"data: ")
        while (piece := await self._next(pieces, len(event))) is not None:
            event += piece
        return bytes(event + b"\n\n")

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
            self._failure = None  # its traceback refers to this object

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

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


def _check_response_scores(requests: Sequence[Job]) -> None:
    """Refuses requests whose prompts have more log-probabilities than a response may have, before any is computed."""
    scores = [scores for request in requests if (scores := request.num_scores) is not None]
    if (total := sum(each.logprobs for each in scores)) > MAX_UNSTREAMED_LOGPROBS:
        raise InvalidRequest(
            "prompt",
            f"asks for {total} log-probabilities of {len(scores)} prompts, those of alternatives included; at most "
            f"{MAX_UNSTREAMED_LOGPROBS} fit one response; send fewer prompts at once, or ask for fewer alternatives",
        )

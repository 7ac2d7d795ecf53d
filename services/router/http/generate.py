"""Runs one generating request of the OpenAI API, from its choices to the last byte of the response."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Sequence
from contextlib import AsyncExitStack
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from overfill.api.keys import ApiKey
from overfill.api.openai import answers
from overfill.api.openai.answers import Choice, Envelope
from overfill.api.openai.errors import from_error
from overfill.api.openai.wire import ApiRequest
from overfill.errors import OverfillError
from overfill.rpc.status import as_overfill_error
from overfill.telemetry import tracing
from overfill.telemetry.tracing import Span
from overfill.v1 import inference_pb2
from services.router.generation import Generation, Generator, choices

T = TypeVar("T")

_Event = tuple[Choice, inference_pb2.Delta | None]
"""A delta of a choice; None when the choice is complete."""


class RunningChoices:
    """The running choices of one request."""

    def __init__(
        self,
        generator: Generator,
        asked: ApiRequest,
        envelope: Envelope,
        key: ApiKey | None,
        span: Span = tracing.OFF,
    ) -> None:
        self._span = span
        self._generator = generator
        self._asked = asked
        self._envelope = envelope
        self._key = key
        self._stack = AsyncExitStack()
        self.choices: list[Choice] = []
        self._running: list[Generation] = []
        self._failure: BaseException | None = None

    async def start(self, received: float) -> None:
        """Queues every choice. If it raises ApiError or OverfillError, no choice runs."""
        asked, generator = self._asked, self._generator
        try:
            total = len(asked.prompts) * asked.n
            checked = [await generator.check(request, self._key, answers=total) for request in asked.prompts]
            with generator.starting(self._key, total) as start:
                for prompt, request in enumerate(checked):
                    for each in choices(request, asked.n):
                        generation = start(each, received, None)
                        self._running.append(await self._stack.enter_async_context(generation))
                        self.choices.append(self._choice(prompt, generation))
        except BaseException as error:
            self._failure = error
            await self.close()
            self._raise_named(error)
            raise

    def _raise_named(self, error: BaseException) -> None:
        """Raises an error about the grammar again, with the grammar's field as the client named it."""
        if isinstance(error, OverfillError) and (named := self._asked.with_grammar_field(error)) is not error:
            raise named from error

    def _choice(self, prompt: int, generation: Generation) -> Choice:
        return Choice(
            index=len(self.choices),
            envelope=self._envelope,
            seed=generation.accepted.seed,
            prompt_tokens=generation.accepted.prompt_tokens,
            logprobs=self._asked.prompts[prompt].sampling.HasField("logprobs"),
            echo=self._echo(prompt),
        )

    async def whole(self) -> dict[str, Any]:
        """Waits until every choice is complete; returns the response. Raises OverfillError."""
        async for choice, delta in self.events():
            if delta is not None:
                choice.add(delta)
        return self._envelope.wrap(
            [choice.whole() for choice in self.choices],
            chunk=False,
            usage=answers.usage(self.choices, self._asked.n),
            overfill=self._envelope.extension(self._ends(self.choices)),
        )

    async def stream(self) -> AsyncIterator[bytes]:
        """Yields the response as server-sent events. Raises OverfillError."""
        begun: set[int] = set()
        async for choice, delta in self.events():
            if choice.index not in begun:
                begun.add(choice.index)
                if (first := choice.first()) is not None:
                    yield self._chunk(first)
            if delta is None:
                extension = self._envelope.extension(self._ends([choice]))
                yield self._chunk(choice.last(), overfill=extension)
            elif (piece := choice.chunk(delta)) is not None:
                yield self._chunk(piece)
        if self._asked.include_usage:
            total = answers.usage(self.choices, self._asked.n)
            yield answers.event(self._envelope.wrap([], chunk=True, usage=total))
        yield answers.DONE

    async def events(self) -> AsyncIterator[_Event]:
        """Yields the deltas of all choices as they arrive."""
        try:
            async for event in self._events():
                yield event
        except OverfillError as error:
            self._failure = error
            self._raise_named(error)
            raise

    async def _events(self) -> AsyncIterator[_Event]:
        if len(self._running) == 1:
            choice, generation = self.choices[0], self._running[0]
            async for delta in generation.all_deltas():
                yield choice, delta
            choice.finished = generation.finished
            yield choice, None
            return
        said: asyncio.Queue[_Event | Exception] = asyncio.Queue(maxsize=len(self._running))
        pumps = [
            asyncio.ensure_future(_pump(choice, generation, said))
            for choice, generation in zip(self.choices, self._running, strict=True)
        ]
        try:
            left = len(pumps)
            while left:
                event = await said.get()
                if isinstance(event, Exception):
                    raise event
                yield event
                left -= event[1] is None
        finally:
            for pump in pumps:
                pump.cancel()

    async def close(self) -> None:
        """Ends the choices that still run."""
        try:
            await self._stack.aclose()
        finally:
            self._span.end(self._failure)

    def _chunk(self, choice: dict[str, Any], **more: Any) -> bytes:
        if self._asked.continuous_usage:
            more["usage"] = answers.usage(self.choices, self._asked.n)
        elif self._asked.include_usage:
            more["usage"] = None
        return answers.event(self._envelope.wrap([choice], chunk=True, **more))

    def _ends(self, ended: Sequence[Choice]) -> list[tuple[int, int, inference_pb2.Finished]]:
        return [(choice.index, choice.seed, choice.finished) for choice in ended if choice.finished is not None]

    def _echo(self, prompt: int) -> str:
        if self._asked.echo is None:
            return ""
        text = self._asked.echo[prompt]
        return text if isinstance(text, str) else self._generator.tokenizer.decode(list(text))


async def _pump(choice: Choice, generation: Generation, said: asyncio.Queue[_Event | Exception]) -> None:
    try:
        async for delta in generation.all_deltas():
            await said.put((choice, delta))
        choice.finished = generation.finished
        await said.put((choice, None))
    except Exception as error:
        await said.put(error)


class EventStream(Response):
    """Streams the choices. ``begin`` raises errors that occur before the first event."""

    media_type = "text/event-stream"

    def __init__(self, answers: RunningChoices, request_id: str) -> None:
        headers = {"cache-control": "no-cache", "x-accel-buffering": "no", "x-request-id": request_id}
        super().__init__(headers=headers)
        del self.headers["content-length"]
        self._answers = answers
        self._events = answers.stream()
        self._first = b""

    async def begin(self, request: Request) -> None:
        """Waits for the first event. Raises OverfillError or ClientGone."""
        self._first = await while_connected(request.receive, self._next())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            await send({"type": "http.response.body", "body": self._first, "more_body": True})
            with contextlib.suppress(ClientGone):
                await while_connected(receive, self._send_all(send))
        finally:
            await self._answers.close()

    async def _send_all(self, send: Send) -> None:
        try:
            async for event in self._events:
                await send({"type": "http.response.body", "body": event, "more_body": True})
        except Exception as error:
            body = from_error(as_overfill_error(error)).body
            await send({"type": "http.response.body", "body": answers.event(body), "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    async def _next(self) -> bytes:
        return await anext(self._events)


class ClientGone(Exception):
    """The client has closed the connection."""


async def while_connected(receive: Receive, work: Awaitable[T]) -> T:
    """Returns the result of ``work``. If the client disconnects first, cancels ``work`` and raises ClientGone."""
    working = asyncio.ensure_future(work)
    watching = asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait((working, watching), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientGone
        return working.result()
    finally:
        watching.cancel()
        working.cancel()
        await asyncio.wait((working, watching))


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass

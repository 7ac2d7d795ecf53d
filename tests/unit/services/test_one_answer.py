"""Tests what a client of one answer gets: events in order, pings in a silence, and errors."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from overfill.errors import OverfillError, Unavailable
from overfill.routing.answer import AnswerDelta
from services.router.http import one_answer
from services.router.http.one_answer import OneAnswer


class Writer:
    """Writes names of events, and counts nothing."""

    def __init__(self) -> None:
        self.text = ""

    def begin(self, accepted: Any, cached_tokens: int) -> bytes:
        return b"begin(%d) " % cached_tokens

    def delta(self, delta: AnswerDelta) -> bytes:
        self.text += delta.reasoning + delta.text
        return delta.text.encode()

    def ping(self) -> bytes:
        return b"ping "

    def end(self, finished: Any) -> bytes:
        return b" end"

    def fail(self, error: Any) -> bytes:
        return b" failed %d" % error.status

    def whole(self, finished: Any) -> bytes:
        return self.text.encode()


class Answer:
    """An answer that gives ``parts``: texts, an event to wait for, or an error."""

    def __init__(self, *parts: str | asyncio.Event | OverfillError, rest: str = "") -> None:
        self._parts = list(parts)
        self.accepted = None
        self.cached_tokens = 7
        self.complete = False
        self.finished = None
        self.rest = AnswerDelta(0, [], text=rest) if rest else None

    async def next(self) -> AnswerDelta | None:
        part = self._parts.pop(0) if self._parts else None
        if isinstance(part, asyncio.Event):
            await part.wait()
            part = self._parts.pop(0)
        if isinstance(part, OverfillError):
            raise part
        self.complete = not self._parts
        return None if part is None else AnswerDelta(0, [1], text=str(part))


class Response:
    """The response's side of a request."""

    def __init__(self) -> None:
        self.status: int | None = None
        self.parts: list[bytes] = []
        self.writes_wait = False
        self.three = asyncio.Event()  # parts have been written
        self.answered = False

    def begin(self, status: int, headers: Any) -> None:
        self.status = status

    def write(self, part: bytes, *, last: bool = False) -> None:
        assert part
        assert not self.answered
        self.parts.append(part)
        self.answered = last
        if len(self.parts) == 3:
            self.three.set()


def _one(answer: Answer, response: Response) -> tuple[OneAnswer, list[BaseException | None]]:
    spans: list[BaseException | None] = []
    span: Any = SimpleNamespace(end=lambda error=None: spans.append(error))
    made: Any = OneAnswer(answer, Writer(), lambda error: error, response, [], span)  # type: ignore[arg-type]
    return made, spans


async def _streamed(answer: Answer, response: Response | None = None) -> tuple[list[bytes], list[BaseException | None]]:
    response = response or Response()
    one, spans = _one(answer, response)
    with one:
        await one.stream()
    assert response.answered
    assert response.status == 200
    return response.parts, spans


async def test_the_last_part_leaves_with_the_end() -> None:
    parts, spans = await _streamed(Answer("a", "b", rest="c"))
    assert parts == [b"begin(7) a", b"bc end"]
    assert spans == [None]


async def test_an_answer_without_parts_has_a_beginning_and_an_end() -> None:
    assert (await _streamed(Answer()))[0] == [b"begin(7)  end"]


async def test_a_silence_begins_the_stream_and_then_pings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(one_answer, "PING_INTERVAL", 0.01)
    response = Response()
    parts, _ = await _streamed(Answer(response.three, "a"), response)
    assert parts == [b"begin(7) ", b"ping ", b"ping ", b"a end"]


async def test_an_error_before_the_first_event_is_raised_and_a_later_one_is_an_event() -> None:
    response = Response()
    one, spans = _one(Answer(Unavailable("lost")), response)
    with pytest.raises(Unavailable), one:
        await one.stream()
    assert response.status is None
    parts, later = await _streamed(Answer("a", Unavailable("lost")))
    assert parts == [b"begin(7) a", b" failed 503"]
    assert [type(error) for error in spans + later] == [Unavailable, Unavailable]


async def test_a_whole_answer_has_all_parts_and_what_was_held_back() -> None:
    one, spans = _one(Answer("a", "b", rest="c"), Response())
    with one:
        assert await one.whole() == b"abc"
    assert spans == [None]

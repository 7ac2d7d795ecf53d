"""Tests one connection with random requests, cuts, early answers, drains and disconnects, against a model."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from itertools import pairwise
from unittest.mock import patch

from http_memory import MemoryClient, echo, new_state, parse
from hypothesis import given, settings
from hypothesis import strategies as st

from services.router.http import state as http_state
from services.router.http.request import Request


@dataclass(frozen=True, slots=True)
class Sent:
    """A request, and how its body is framed: the sizes of its chunks, or of one piece with a length."""

    method: str
    sizes: tuple[int, ...]
    chunked: bool

    @property
    def body(self) -> bytes:
        return b"".join(b"%c" % (97 + at) * size for at, size in enumerate(self.sizes))

    @property
    def wire(self) -> bytes:
        """Returns the request's bytes."""
        head = f"{self.method} /a HTTP/1.1\r\nHost: a\r\n".encode()
        if not self.chunked:
            return head + b"Content-Length: %d\r\n\r\n" % len(self.body) + self.body
        chunks = b"".join(b"%x\r\n%b\r\n" % (size, b"%c" % (97 + at) * size) for at, size in enumerate(self.sizes))
        return head + b"Transfer-Encoding: chunked\r\n\r\n" + chunks + b"0\r\n\r\n"

    @property
    def answer(self) -> str | int:
        """Returns the answer that the client must get."""
        return 403 if self.method == "PUT" else f"{self.method} /a {self.body.decode()}"


REQUEST = st.builds(
    Sent,
    st.sampled_from(["GET", "POST", "PUT"]),
    st.lists(st.integers(1, 30), max_size=3).map(tuple),
    st.booleans(),
)


@settings(max_examples=300, deadline=None)
@given(
    requests=st.lists(REQUEST, max_size=7),
    bad=st.booleans(),
    cuts=st.lists(st.integers(0, 600), max_size=8),
    turns=st.lists(st.integers(0, 3), min_size=9, max_size=9),
    finish_at=st.integers(0, 9),
    drain_at=st.none() | st.integers(0, 8),
    disconnect_at=st.none() | st.integers(0, 8),
)
def test_answers_come_once_and_in_order_and_nothing_is_left(
    requests: list[Sent],
    bad: bool,
    cuts: list[int],
    turns: list[int],
    finish_at: int,
    drain_at: int | None,
    disconnect_at: int | None,
) -> None:
    """``GET`` is answered from part ``finish_at`` on; ``PUT`` is refused before its body has arrived."""
    wire = b"".join(request.wire for request in requests) + (b"what is this?\r\n\r\n" if bad else b"")
    expected = [request.answer for request in requests] + ([400] if bad else [])
    ends = [0, *sorted(min(cut, len(wire)) for cut in cuts), len(wire)]

    async def play() -> None:
        finish = asyncio.Event()

        async def app(request: Request) -> None:
            if request.method == "GET":
                await finish.wait()
            if request.method == "PUT":
                request.respond(403, b"no")
            else:
                await echo(request)

        state = new_state(app)
        client = MemoryClient(state)
        for part, (begin, end) in enumerate(pairwise(ends)):
            if part == finish_at:
                finish.set()
            if part == drain_at:
                state.draining = True
                for connection in list(state.open):
                    connection.drain()
            if part == disconnect_at:
                client.disconnect()
            client.send(wire[begin:end])
            for _ in range(turns[part]):
                await asyncio.sleep(0)
        finish.set()
        for _ in range(100):  # nothing here waits for a clock or a socket
            await asyncio.sleep(0)
        answers = parse(client.received)
        client.send_eof()
        await client.until_lost()
        whole = drain_at is None and disconnect_at is None
        assert answers == (expected if whole else expected[: len(answers)])
        assert (state.open, {**state.free, **state.receiving}, state.budget._sum, dict(state.budget._held)) == (
            set(),
            {},
            0,
            {},
        )
        assert asyncio.all_tasks() == {asyncio.current_task()}

    with patch.object(http_state, "SHORT", 0):  # each body counts
        asyncio.run(play())

"""Tests the HTTP port against malformed, smuggled and unusual requests."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from http_cases import CASES, Case
from http_memory import MemoryClient, echo, new_state, parse

END = b"GET /end HTTP/1.1\r\nHost: a\r\n\r\n"
ECHOED_END = "GET /end "

SHORT = 250
"""Size in bytes of the longest case that is split at every byte."""

each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def expected(case: Case) -> list[str | int]:
    return [*case.answers, *([ECHOED_END] if case.open else [])]


@each_case
async def test_the_port_answers(case: Case, serve: Any) -> None:
    _, address = await serve(echo)
    reader, writer = await asyncio.open_connection(*address)
    try:
        writer.write(case.data + (END if case.open else b""))
        received = b""
        while case.open is False or len(parse(received)) < len(expected(case)):
            part = await reader.read(1 << 16)
            if not part:
                break
            received += part
        assert parse(received) == expected(case)
        if case.open is None:
            writer.write_eof()
            assert await reader.read() == b""
    finally:
        writer.transport.abort()


@pytest.mark.parametrize("case", [case for case in CASES if len(case.data) <= SHORT], ids=lambda case: case.name)
async def test_the_answer_does_not_depend_on_how_the_bytes_arrive(case: Case) -> None:
    """Cuts the bytes into two at every place, and into single bytes. Between the parts, the server may answer."""
    data = case.data
    ways = [[data[:cut], data[cut:]] for cut in range(1, len(data))] + [[data[at : at + 1] for at in range(len(data))]]
    state = new_state()

    async def ask(parts: list[bytes]) -> None:
        client = MemoryClient(state)

        def answers() -> list[str | int]:
            found = parse(client.received)
            return found if 100 in case.answers else [answer for answer in found if answer != 100]

        for part in parts:
            client.send(part)
            await asyncio.sleep(0)  # the server's turn
        if case.open:
            client.send(END)
        await client.until(lambda: case.open is not False and len(answers()) >= len(expected(case)))
        assert client.closed is (case.open is False), parts
        client.send_eof()
        await client.until_lost()
        assert answers() == expected(case), parts

    for parts in ways:
        await ask(parts)
    assert not state.open

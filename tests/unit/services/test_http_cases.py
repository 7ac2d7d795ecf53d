"""Tests the HTTP port against malformed, smuggled and unusual requests."""

from __future__ import annotations

import asyncio
import json
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


@pytest.mark.parametrize("before", [b"", b"GET /first HTTP/1.1\r\nHost: a\r\n\r\n"], ids=["first", "behind an answer"])
@pytest.mark.parametrize(
    ("path", "headers", "anthropic"),
    [
        ("/v1/messages", b"x-api-key: a\r\nx-api-key: b\r\n", True),
        ("/v1/models", b"anthropic-version: 1\r\nx-api-key: a\r\nx-api-key: b\r\n", True),
        ("/v1/messages", b"transfer-encoding: gzip\r\n", True),  # found at the end of the head
        ("/v1/models", b"x-api-key: a\r\nx-api-key: b\r\n", False),
    ],
)
async def test_a_refused_head_is_answered_in_the_form_of_its_api(path, headers, anthropic, before):
    client = MemoryClient(new_state())
    client.send(before + f"POST {path} HTTP/1.1\r\nHost: a\r\n".encode() + headers + b"\r\n")
    await client.until(lambda: False)
    head, _, body = client.received.rpartition(b"\r\n\r\n")
    error = json.loads(body)
    assert head.rpartition(b"HTTP/1.1 ")[2].startswith(b"400 ")
    assert (error.get("type") == "error", b"\r\nrequest-id: " in head) == (anthropic, anthropic)
    assert not anthropic or error["error"]["type"] == "invalid_request_error"

"""Tests how the log-probabilities of many requests are encoded: one piece at a time, with other tasks in between."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

from services.router.http.generate import _SHORT, RunningChoices


async def test_long_messages_let_other_tasks_run_between_all_their_pieces() -> None:
    happened: list[str] = []
    requests: Any = SimpleNamespace(_encoding=asyncio.Lock())

    def pieces() -> Any:
        for _ in range(5):
            happened.append("piece")
            yield b"x" * _SHORT

    async def encode() -> None:
        made, size = pieces(), 0
        while (piece := await RunningChoices._next(requests, made, size)) is not None:
            size += len(piece)

    async def run_beside() -> None:
        while True:
            happened.append("other")
            await asyncio.sleep(0)

    other = asyncio.create_task(run_beside())
    await asyncio.gather(*[encode() for _ in range(4)])
    other.cancel()
    assert happened.count("piece") == 20
    begun = [place for place, each in enumerate(happened) if each == "piece"][3]  # the first pieces do not wait
    assert "piece,piece" not in ",".join(happened[begun:])

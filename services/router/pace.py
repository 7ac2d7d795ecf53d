"""Decides when streams write, so that a router that is full still reads from its workers. Knows no tokens."""

from __future__ import annotations

import asyncio

MIN_ROUND = 2e-3
"""Seconds. After shorter rounds there is no pause."""

PAUSE_SHARE = 0.25
"""Length of a pause, as a share of the round before it."""

MAX_PAUSE = 10e-3
"""Maximum length of a pause in seconds. A round may take long because the process did not run."""


class Pace:
    """Lets streams write in rounds, with a pause after each.

    When a worker's message has tokens for many streams, all of them write in one pass of the event loop: a round. The
    loop takes one message of a worker per pass. So while the next message arrives before a round is over, messages
    would pile up unread. In a pause the loop only reads, and a stream's tokens merge into one event.

    Attributes:
        paused: True while streams should wait with ``resumed`` before they write.
    """

    def __init__(self) -> None:
        self.paused = False
        self._began: float | None = None
        self._resumed = asyncio.Event()

    async def resumed(self) -> None:
        """Waits for the end of the pause."""
        await self._resumed.wait()

    def writing(self) -> None:
        """Marks that a stream writes now. The first call begins a round, which ends with this pass of the loop."""
        if self._began is None:
            loop = asyncio.get_running_loop()
            self._began = loop.time()
            loop.call_soon(self._end_round)

    def _end_round(self) -> None:
        assert self._began is not None
        loop = asyncio.get_running_loop()
        length, self._began = loop.time() - self._began, None
        if length > MIN_ROUND and not self.paused:
            self.paused = True
            self._resumed.clear()
            loop.call_later(min(length * PAUSE_SHARE, MAX_PAUSE), self._resume)

    def _resume(self) -> None:
        self.paused = False
        self._resumed.set()

"""Is the other end still taking part? A minimum rate, judged only while there is something to move."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from overfill.errors import TransferFailed
from overfill.rpc.constants import MIN_PULL_GRACE, MIN_PULL_RATE

_INTERVAL = 0.5  # seconds between looks at a transfer


class PullPace:
    """Judges a transfer in windows of ``MIN_PULL_GRACE`` seconds.

    In a window that starts with bytes ready and not moved, at least ``MIN_PULL_RATE`` must be kept, or all
    that was ready then must move. A peer that stops is noticed within two windows.
    """

    def __init__(self, now: float) -> None:
        self._start = now
        self._moved = 0
        self._ready = 0

    def too_slow(self, now: float, ready: int, moved: int) -> bool:
        """Whether the minimum is broken. ``ready`` and ``moved`` are bytes since the transfer began."""
        if moved >= ready:
            self._restart(now, ready, moved)
            return False
        if now - self._start < MIN_PULL_GRACE:
            return False
        if self._ready <= self._moved:  # nothing was owed when the window began
            self._restart(now, ready, moved)
            return False
        owed = min(self._ready - self._moved, int(MIN_PULL_RATE * (now - self._start)))
        if moved - self._moved < owed:
            return True
        self._restart(now, ready, moved)
        return False

    def _restart(self, now: float, ready: int, moved: int) -> None:
        self._start, self._ready, self._moved = now, ready, moved


async def watch_pace(peer: str, ready: Callable[[], int], moved: Callable[[], int]) -> None:
    """Looks on until cancelled. ``ready`` and ``moved`` give bytes since the transfer began.

    Raises:
        TransferFailed: the minimum rate is broken; ``peer`` is named.
    """
    pace = PullPace(time.monotonic())
    while True:
        await asyncio.sleep(_INTERVAL)
        if pace.too_slow(time.monotonic(), ready(), moved()):
            raise TransferFailed(f"KV moves too slowly to or from {peer}: {moved()} of {ready()} bytes ready")

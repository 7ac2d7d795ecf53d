"""How many routers this router's own load needs. Pure code: no clock, no I/O."""

from __future__ import annotations

from collections import deque

WINDOW = 15.0
"""Seconds over which a router's load is averaged: a usual interval between two scrapes."""

FULL = 0.6
"""Share of one core that a router's event loop may use. Above it, answers wait for each other noticeably."""


class RouterNeed:
    """Measures a router's load: the share of one core that its event loop uses, of the share that it may use.

    The loads of all routers add up to the number of routers that they need together.
    """

    def __init__(self) -> None:
        self._read: deque[tuple[float, float]] = deque()

    def update(self, now: float, cpu_seconds: float) -> float:
        """Returns the number of routers that this router's load of the last ``WINDOW`` seconds needs; 0 at first.

        Args:
            now: seconds, monotonic.
            cpu_seconds: CPU time of the event loop's thread since its start.
        """
        self._read.append((now, cpu_seconds))
        while len(self._read) > 2 and self._read[1][0] <= now - WINDOW:
            self._read.popleft()
        since, used = self._read[0]
        return (cpu_seconds - used) / (now - since) / FULL if now > since else 0.0

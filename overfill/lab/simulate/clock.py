"""Virtual time: runs events in order of time, then of scheduling. Deterministic; never waits."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(eq=False, slots=True)
class Event:
    """A scheduled call that can be cancelled."""

    time: float
    action: Callable[..., None] | None
    args: tuple[Any, ...]

    def cancel(self) -> None:
        self.action = None


class Clock:
    """The clock of a simulation.

    Attributes:
        now: Seconds since the simulation began.
        events: Number of events that have run.
    """

    def __init__(self) -> None:
        self.now = 0.0
        self.events = 0
        self._heap: list[tuple[float, int, Event]] = []
        self._order = 0

    def at(self, time: float, action: Callable[..., None], *args: Any) -> Event:
        """Schedules ``action(*args)`` at ``time``; now if that is in the past."""
        event = Event(max(time, self.now), action, args)
        self._order += 1
        heapq.heappush(self._heap, (event.time, self._order, event))
        return event

    def after(self, delay: float, action: Callable[..., None], *args: Any) -> Event:
        return self.at(self.now + delay, action, *args)

    def step(self) -> bool:
        """Runs the next event. Returns False when there is none."""
        while self._heap:
            self.now, _, event = heapq.heappop(self._heap)
            if event.action is not None:
                self.events += 1
                event.action(*event.args)
                return True
        return False

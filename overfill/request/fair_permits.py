"""Permits for something scarce: each API key has one at a time, and keys that wait get theirs in rotation."""

from __future__ import annotations

import asyncio
from collections import deque

from overfill.errors import Overloaded


class FairPermits:
    """Admits a few callers at a time, one per key. All callers use one event loop.

    Args:
        most: maximum number of permits at once.
        waiting: maximum number of callers of one key that wait.
    """

    def __init__(self, most: int, waiting: int) -> None:
        self._most, self._most_waiting = most, waiting
        self._held: set[str] = set()
        self._queues: dict[str, deque[asyncio.Future[None]]] = {}  # in the order of the keys' next permits

    async def take(self, key: str) -> None:
        """Waits for a permit, which ``release`` ends. Raises Overloaded if too many callers of the key wait."""
        queue = self._queues.get(key, deque())
        if not queue and key not in self._held and len(self._held) < self._most:
            self._held.add(key)
            return
        if len(queue) >= self._most_waiting:
            raise Overloaded(
                f"{len(queue)} new grammars of this client wait to be checked, which is the maximum", 1.0, "grammars"
            )
        permit: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        queue.append(permit)
        self._queues[key] = queue
        try:
            # A shield: ``release`` may grant the permit between the task's cancellation and this task's next step.
            await asyncio.shield(permit)
        except asyncio.CancelledError:
            if permit.done():
                self.release(key)
            else:
                queue.remove(permit)
                if not queue:
                    del self._queues[key]
            raise

    def release(self, key: str) -> None:
        """Returns the key's permit. Free ones go to the keys whose last one is longest ago."""
        self._held.discard(key)
        if key in self._queues:
            self._queues[key] = self._queues.pop(key)
        for next_key in [*self._queues]:
            if len(self._held) >= self._most:
                return
            if next_key in self._held:
                continue
            queue = self._queues[next_key]
            permit = queue.popleft()
            if not queue:
                del self._queues[next_key]
            self._held.add(next_key)
            permit.set_result(None)

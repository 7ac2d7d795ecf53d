"""A time limit for many awaits at once, with one timer for all of them."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable
from typing import TypeVar

T = TypeVar("T")


class SharedTimeout:
    """Limits how long tasks wait. Use it from one event loop, with the same limit in all calls.

    ``asyncio.timeout`` makes a timer for each wait, which costs a third of sending a message.
    """

    def __init__(self) -> None:
        # Times on the event loop's clock, oldest wait first; infinity once the wait has been given up.
        self._deadlines: dict[asyncio.Task[object], float] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    async def wait(self, awaitable: Awaitable[T], seconds: float) -> T:
        """Awaits ``awaitable`` for at most ``seconds``. A task may have one wait at a time.

        Raises:
            TimeoutError: ``seconds`` have passed; ``awaitable`` has been cancelled.
        """
        if (loop := self._loop) is None:
            loop = self._loop = asyncio.get_running_loop()  # asks the kernel for the process each time
        task = asyncio.current_task(loop)
        assert task is not None
        deadline = self._deadlines[task] = loop.time() + seconds
        if self._timer is None:
            self._timer = loop.call_at(deadline, self._expire, loop)
        try:
            return await awaitable
        except asyncio.CancelledError:
            # A task that is also cancelled for another reason, such as the end of its RPC, stays cancelled.
            if self._deadlines[task] == math.inf and not task.uncancel():
                raise TimeoutError from None
            raise
        finally:
            del self._deadlines[task]

    def _expire(self, loop: asyncio.AbstractEventLoop) -> None:
        self._timer = None
        now = loop.time()
        for task, deadline in self._deadlines.items():
            if deadline == math.inf:
                continue
            if deadline > now:
                self._timer = loop.call_at(deadline, self._expire, loop)
                return
            self._deadlines[task] = math.inf
            task.cancel()

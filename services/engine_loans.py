"""Loans: references on cached blocks of an engine, for a reader beside it, such as a peer's pull or the disk tier.

Knows messages and events only; what reads the blocks, and where to, is the borrower's.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from overfill.engine.sequence import Lend, Lent, Release
from overfill.kv.keys import PromptBlocks


class EngineLoans:
    """Asks an engine to lend blocks, and gives each loan back. Call it on the event loop.

    Args:
        send: passes a message to the engine, in order.
    """

    def __init__(self, send: Callable[[object], None]) -> None:
        self._send = send
        self._numbers = itertools.count(1)
        self._asked: dict[str, asyncio.Future[Lent]] = {}

    def on_event(self, event: Lent) -> None:
        """Handles the engine's answer. Ignores one that the borrower no longer waits for."""
        asked = self._asked.get(event.id)
        if asked is not None and not asked.done():
            asked.set_result(event)

    @asynccontextmanager
    async def lend(self, prompt: PromptBlocks, *, to_peer: bool = False) -> AsyncIterator[Lent]:
        """Provides the blocks with the beginning of ``prompt``; ``Lent.tokens`` is 0 if the engine has none.

        At the end of the context, also by a cancel, the blocks are given back: by then, nothing may read them.

        Args:
            to_peer: whether another worker decides when the loan ends.
        """
        id = f"loan-{next(self._numbers)}"
        asked = self._asked[id] = asyncio.get_running_loop().create_future()
        self._send(Lend(id, prompt, to_peer))
        try:
            yield await asked
        finally:
            del self._asked[id]
            self._send(Release(id))

"""Hashes prompts for the prefix cache beside the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from overfill.kv.keys import PromptBlocks

_SHORT = 512
"""Tokens that are hashed on the event loop, in 0.1 ms."""


class PromptHasher:
    """Computes the prefix-cache keys of long prompts on a thread of its own, so that the event loop stays free.

    A short prompt takes less time than the thread takes to wake up.

    It does not use asyncio's default executor, where prompts would wait for other work.

    Args:
        blocks_of: the engine's way to hash a prompt, as in ``ServedHalf``.
    """

    def __init__(self, blocks_of: Callable[[Sequence[int], str], PromptBlocks]) -> None:
        self._blocks_of = blocks_of
        self._executor = ThreadPoolExecutor(1, "hash")

    async def blocks_of(self, prompt: Sequence[int], namespace: str) -> PromptBlocks:
        """Returns the blocks of ``prompt`` with their keys; prompts share KV within one ``namespace`` only."""
        if len(prompt) <= _SHORT:
            return self._blocks_of(prompt, namespace)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._executor, self._blocks_of, prompt, namespace)

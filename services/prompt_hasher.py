"""Hashes prompts for the prefix cache beside the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from overfill.kv.keys import PromptBlocks


class PromptHasher:
    """Computes the prefix-cache keys of prompts on a thread of its own, so that the event loop stays free.

    It does not use asyncio's default executor, where prompts would wait for other work.

    Args:
        blocks_of: the engine's way to hash a prompt, as in ``ServedHalf``.
    """

    def __init__(self, blocks_of: Callable[[Sequence[int], str], PromptBlocks]) -> None:
        self._blocks_of = blocks_of
        self._executor = ThreadPoolExecutor(1, "hash")

    async def blocks_of(self, prompt: Sequence[int], namespace: str) -> PromptBlocks:
        """Returns the blocks of ``prompt`` with their keys; prompts share KV within one ``namespace`` only."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._executor, self._blocks_of, prompt, namespace)

"""Disk tiers with small stores of random KV, and an engine that lends what the store has."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from overfill.kv.cache import KvCache
from overfill.kv.disk import DiskLimits, DiskTier
from overfill.kv.disk_files import DiskFiles
from overfill.kv.disk_format import BlockFormat
from overfill.kv.handshake import KvIdentity
from overfill.kv.keys import PromptBlocks, root_key
from overfill.kv.spec import KvSpec, RopeSpec

SMALL = KvSpec(3, 2, 8, "float32", RopeSpec())
BLOCK = 4
"""Tokens of a block; with ``SMALL`` a file takes one page."""


def identity_of(kv: KvSpec = SMALL, **changed: str) -> KvIdentity:
    return replace(KvIdentity(1, "full", "tokenizer", kv), **changed)  # type: ignore[arg-type]


class Counts:
    """What a tier has counted; ``until`` waits for it."""

    def __init__(self) -> None:
        self.number: Counter[str] = Counter()
        self._loop = asyncio.get_running_loop()
        self._changed = asyncio.Event()

    async def until(self, condition: Callable[[Counter[str]], object]) -> None:
        while not condition(self.number):
            self._changed.clear()
            await self._changed.wait()

    def read(self, nbytes: int) -> None:
        self._add("read", 1)

    def written(self, nbytes: int) -> None:
        self._add("written", 1)

    def dropped(self, blocks: int) -> None:
        self._add("dropped", blocks)

    def evicted(self, blocks: int) -> None:
        self._add("evicted", blocks)

    def failed(self, kind: str) -> None:
        self._add(f"{kind} failed", 1)

    def _add(self, name: str, number: int) -> None:
        def add() -> None:
            self.number[name] += number
            self._changed.set()

        self._loop.call_soon_threadsafe(add)


class DiskWorker:
    """A store full of random KV, of which prompts have the blocks 0, 1, ..., and its tier on ``folder``.

    Attributes:
        cached: prompt, by its first key -> tokens that the engine has of it; without an entry, all.
        loans: tokens of each loan that was given back.
    """

    def __init__(
        self,
        folder: Path,
        *,
        identity: KvIdentity | None = None,
        block_size: int = BLOCK,
        num_blocks: int = 8,
        seed: int = 0,
        size: int = 1 << 30,
        bandwidth: float = 1e18,
    ) -> None:
        self.identity = identity or identity_of()
        self.folder = folder
        self.store = random_store(self.identity.kv, num_blocks, block_size, seed)
        self.files = DiskFiles(folder)
        self.counts = Counts()
        self.cached: dict[int, int] = {}
        self.loans: list[int] = []
        self.threads = ThreadPoolExecutor(2)
        self.limits = DiskLimits(size, bandwidth)
        self.tier = DiskTier(self.files, self.limits, self.identity, self.store, self.lend, self.threads, self.counts)

    @property
    def table(self) -> list[int]:
        return list(range(self.store.num_blocks))

    def prompt(self, first: int = 0, num_blocks: int = 8, namespace: str = "") -> PromptBlocks:
        """A prompt whose tokens count up from ``first``."""
        size = self.store.block_size
        root = root_key(self.identity.cache_key, namespace)
        return PromptBlocks(list(range(first, first + num_blocks * size)), size, root, namespace)

    def paths(self, prompt: PromptBlocks) -> list[Path]:
        """The files of a prompt."""
        names = BlockFormat(self.identity, self.store).names(prompt, len(prompt.keys))
        return [self.folder / name[:2] / name for name in names]

    @asynccontextmanager
    async def lend(self, prompt: PromptBlocks) -> AsyncIterator[Any]:
        tokens = self.cached.get(prompt.keys[0], len(prompt.keys) * self.store.block_size)
        try:
            yield SimpleNamespace(blocks=self.table, tokens=tokens, event=None)
        finally:
            self.loans.append(tokens)

    async def save(self, prompt: PromptBlocks, num_blocks: int | None = None) -> None:
        """Saves a prompt, of which so many blocks are not on disk: by default, all."""
        expected = self.counts.number["written"] + (len(prompt.keys) if num_blocks is None else num_blocks)
        self.tier.save(prompt)
        await self.counts.until(lambda number: number["written"] >= expected)

    async def read(self, prompt: PromptBlocks, begin: int = 0) -> int:
        return await self.tier.read(prompt, self.table, begin, len(prompt.keys))

    async def close(self) -> None:
        await self.tier.close()
        self.threads.shutdown()


async def until_known(tier: DiskTier, prompt: PromptBlocks, number: int) -> None:
    """Waits until a tier that has started knows so many of the prompt's blocks."""
    while tier.known(prompt, 0) < number:
        await asyncio.sleep(0.001)


def random_store(kv: KvSpec, num_blocks: int, block_size: int, seed: int) -> KvCache:
    store = KvCache(kv, num_blocks, block_size, torch.device("cpu"))
    generator = torch.Generator().manual_seed(seed)
    for half in (store.k, store.v):
        half.copy_(torch.randn(half.shape, generator=generator))
    return store


def equal_blocks(one: KvCache, other: KvCache) -> list[int]:
    """The blocks with the same bits in both stores."""
    same = [
        (half.view(torch.uint8) == of_other.view(torch.uint8)).transpose(0, 1).flatten(1).all(1)
        for half, of_other in ((one.k, other.k), (one.v, other.v))
    ]
    return (same[0] & same[1]).nonzero().flatten().tolist()  # type: ignore[no-any-return]

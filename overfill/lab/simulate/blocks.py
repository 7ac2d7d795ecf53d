"""KV blocks of a modelled prefill worker: the real prefix cache for traces with shared prefixes, counters for others.

A block of the trace (512 tokens for Mooncake) is one block of the worker, and its number replaces its tokens. Hits and
evictions are therefore those of ``kv.prefix`` with this block size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from overfill.kv.blocks import BlockPool
from overfill.kv.keys import PromptBlocks
from overfill.kv.prefix import PrefixCache
from overfill.lab.simulate.imports import leading_blocks
from overfill.v1 import registry_pb2

_FIRST_UNIQUE_ID = 1 << 31
"""First number for blocks that no other prompt shares. Block numbers are 32-bit."""


class Blocks(Protocol):
    """Block accounting of a prefill worker. Arguments and results are in tokens; the properties are in blocks."""

    block_size: int
    tokens_looked_up: int
    tokens_found: int

    @property
    def total(self) -> int: ...

    @property
    def used(self) -> int: ...

    @property
    def cached(self) -> int: ...

    def acquire(self, owner: str, prompt_tokens: int, shared: Sequence[int]) -> int | None:
        """Acquires a prompt's blocks and returns its number of cached tokens. None means too few free blocks."""

    def publish(self, owner: str, num_tokens: int) -> None: ...

    def release(self, owner: str) -> None: ...

    def leading(self, keys: Sequence[int], begin: int) -> int:
        """As ``KvSource.leading``, of the blocks in memory."""

    def delta(self) -> registry_pb2.PrefixDelta | None:
        """Returns the changes of the cache since the last call, for a report."""


class CountedBlocks:
    """Counts blocks, for traces without shared prefixes."""

    def __init__(self, kv_tokens: int, block_size: int) -> None:
        self.block_size = block_size
        self.total = kv_tokens // block_size
        self.used = 0
        self.cached = 0
        self.tokens_looked_up = self.tokens_found = 0
        self._held: dict[str, int] = {}

    def acquire(self, owner: str, prompt_tokens: int, shared: Sequence[int]) -> int | None:
        count = -(-prompt_tokens // self.block_size)
        if count > self.total - self.used:
            return None
        self._held[owner] = count
        self.used += count
        return 0

    def publish(self, owner: str, num_tokens: int) -> None:
        pass

    def release(self, owner: str) -> None:
        self.used -= self._held.pop(owner, 0)

    def leading(self, keys: Sequence[int], begin: int) -> int:
        return begin

    def delta(self) -> registry_pb2.PrefixDelta | None:
        return None


class SharedBlocks:
    """Runs ``kv.prefix.PrefixCache`` over the trace's blocks."""

    def __init__(self, kv_tokens: int, block_size: int, *, enabled: bool = True) -> None:
        self.block_size = block_size
        self._pool = BlockPool(max(1, kv_tokens // block_size), 1)
        self._cache = PrefixCache(self._pool, enabled=enabled, attention_tokens=max(1.0, 4096 / block_size))
        self._feed = self._cache.journal.feed()
        self._next = 0
        self._refused: tuple[str, PromptBlocks] | None = None  # (owner, prompt) of the last refusal
        self.tokens_looked_up = self.tokens_found = 0

    @property
    def total(self) -> int:
        return self._pool.num_blocks

    @property
    def used(self) -> int:
        return self._cache.num_used

    @property
    def cached(self) -> int:
        return self._cache.num_cached

    def acquire(self, owner: str, prompt_tokens: int, shared: Sequence[int]) -> int | None:
        if not self._cache.num_available:
            return None  # a prompt needs at least one free block: its last block is never cached
        if self._refused is not None and self._refused[0] == owner:
            prompt = self._refused[1]  # hashing is slow, and a waiting prompt asks again and again
        else:
            prompt = self._prompt(prompt_tokens, shared)
        grant = self._cache.acquire(owner, prompt, prompt.num_tokens)
        if grant is None:
            self._refused = owner, prompt
            return None
        self._refused = None
        found = grant.cached_tokens * self.block_size
        self.tokens_looked_up += prompt_tokens
        self.tokens_found += found
        return found

    def _prompt(self, prompt_tokens: int, shared: Sequence[int]) -> PromptBlocks:
        full, rest = divmod(prompt_tokens, self.block_size)
        numbers = list(shared[:full])
        for _ in range(full + bool(rest) - len(numbers)):
            numbers.append(_FIRST_UNIQUE_ID + self._next % _FIRST_UNIQUE_ID)
            self._next += 1
        return self._cache.blocks_of(numbers)

    def publish(self, owner: str, num_tokens: int) -> None:
        # Only full blocks: a partial last block is never looked up.
        self._cache.publish(owner, num_tokens // self.block_size)

    def release(self, owner: str) -> None:
        self._cache.release(owner)

    def leading(self, keys: Sequence[int], begin: int) -> int:
        return leading_blocks(self._cache.journal, keys, begin)

    def delta(self) -> registry_pb2.PrefixDelta | None:
        return self._feed.take()

"""KV blocks of a modelled prefill worker: the real prefix cache where a trace says what is shared, counts elsewhere.

A block of the trace (512 tokens for Mooncake) stands for one block of the worker, and one number of the trace for its
tokens, so eviction and hits are those of ``kv.prefix`` itself, at that size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from overfill.kv.blocks import BlockPool
from overfill.kv.keys import PromptBlocks
from overfill.kv.prefix import PrefixCache
from overfill.v1 import registry_pb2

_FIRST_UNIQUE_ID = 1 << 31
"""Numbers from here on stand for blocks that no other prompt shares; a key is made of 32 bits."""


class Blocks(Protocol):
    """What a prefill worker asks of its cache. Tokens, not blocks, in and out."""

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
        """Room for a prompt; how many of its tokens are cached, or None when there is no room."""

    def publish(self, owner: str, num_tokens: int) -> None: ...

    def release(self, owner: str) -> None: ...

    def delta(self) -> registry_pb2.PrefixDelta | None:
        """What has changed since the last call, for a report."""


class CountedBlocks:
    """Nothing is shared: a number is enough."""

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

    def delta(self) -> registry_pb2.PrefixDelta | None:
        return None


class SharedBlocks:
    """``kv.prefix.PrefixCache`` over the trace's blocks."""

    def __init__(self, kv_tokens: int, block_size: int, *, enabled: bool = True) -> None:
        self.block_size = block_size
        self._pool = BlockPool(max(1, kv_tokens // block_size), 1)
        self._cache = PrefixCache(self._pool, enabled=enabled, attention_tokens=max(1.0, 4096 / block_size))
        self._feed = self._cache.journal.feed()
        self._next = 0
        self._refused: tuple[str, PromptBlocks] | None = None  # the owner that was refused last
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
            return None  # the last block of a prompt is never taken from the cache
        if self._refused is not None and self._refused[0] == owner:
            prompt = self._refused[1]  # hashing takes long, and a prompt that waits asks again and again
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
        # The last block, unless it is full, is nobody else's; nor is it ever looked for.
        self._cache.publish(owner, num_tokens // self.block_size)

    def release(self, owner: str) -> None:
        self._cache.release(owner)

    def delta(self) -> registry_pb2.PrefixDelta | None:
        return self._feed.take()

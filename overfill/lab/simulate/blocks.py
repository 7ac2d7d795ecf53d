"""KV blocks of modelled workers: in a prefill worker's memory, on its disk, and those that decode workers lend.

A block of a trace with shared prefixes (512 tokens for Mooncake) is one block of the worker, and its number replaces
its tokens. Hits and evictions are therefore those of ``kv.prefix`` with this block size. Routers' keys name blocks. A
loan or a read that has begun succeeds, even if its blocks are evicted meanwhile.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

from overfill.kv.blocks import BlockPool
from overfill.kv.journal import KeyJournal
from overfill.kv.keys import PromptBlocks
from overfill.kv.prefix import PrefixCache
from overfill.v1 import registry_pb2

_UNSHARED_BLOCK = 16
"""Tokens per block for traces without shared prefixes."""

_FIRST_UNIQUE_ID = 1 << 31
"""First number for blocks that no other prompt shares. Block numbers are 32-bit."""


class SharedBlocks:
    """Blocks that other prompts may use, by key, and the link or disk that moves KV: one prompt's after the other.

    Args:
        journal: Has the keys of the blocks.

    Attributes:
        free_at: Time at which all KV has moved that was asked for so far.
    """

    def __init__(self, journal: KeyJournal) -> None:
        self._journal, self._feed = journal, journal.feed()
        self.free_at = 0.0

    def transfer_end(self, since: float, seconds: float) -> float:
        """Returns when a transfer would end that takes ``seconds`` and can begin at ``since``."""
        return max(self.free_at, since) + seconds

    def transfer(self, since: float, seconds: float) -> float:
        """Begins such a transfer. Returns when it ends."""
        self.free_at = self.transfer_end(since, seconds)
        return self.free_at

    def leading(self, keys: Sequence[int], begin: int) -> int:
        """Returns how many leading blocks of a prompt an importer has after an import; it has ``begin`` before."""
        return next((index for index in range(begin, len(keys)) if keys[index] not in self._journal), len(keys))

    def delta(self) -> registry_pb2.PrefixDelta | None:
        """Returns the changes since the last call, for a report."""
        return self._feed.take()


class KeptBlocks(SharedBlocks):
    """Blocks on a disk, or those that a decode worker lends. The least recently used ones make room for others.

    Args:
        room: Returns the number of blocks that may be kept now.
    """

    def __init__(self, room: Callable[[], int]) -> None:
        super().__init__(KeyJournal())
        self._room = room
        self._keys: OrderedDict[int, None] = OrderedDict()

    def keep(self, keys: Sequence[int]) -> None:
        """Keeps a prompt's leading blocks, given by all their keys."""
        for key in reversed(keys):  # a block is useless without those before it, so that they go last
            self._journal.add(key)
            self._keys[key] = None
            self._keys.move_to_end(key)
        self._make_room()

    def leading(self, keys: Sequence[int], begin: int) -> int:
        self._make_room()
        return super().leading(keys, begin)

    def delta(self) -> registry_pb2.PrefixDelta | None:
        self._make_room()
        return super().delta()

    def _make_room(self) -> None:
        room = max(0, self._room())
        while len(self._keys) > room:
            key, _ = self._keys.popitem(last=False)
            self._journal.remove(key)


class CachedBlocks(SharedBlocks):
    """The memory of a prefill worker: the real prefix cache over the trace's blocks.

    Args:
        kv_tokens: Capacity in tokens.
        shared_block: Tokens of a block that prompts may share. 0 means that no prompt shares any, and none is cached.

    Attributes:
        block_size: Tokens per block.
        cache: The cache, in which each block counts as one token.
    """

    def __init__(self, kv_tokens: int, shared_block: int) -> None:
        self.block_size = shared_block or _UNSHARED_BLOCK
        pool = BlockPool(max(1, kv_tokens // self.block_size), 1)
        attention_tokens = max(1.0, 4096 / self.block_size)
        self.cache = PrefixCache(pool, enabled=shared_block > 0, attention_tokens=attention_tokens)
        super().__init__(self.cache.journal)
        self._next = 0

    def prompt(self, num_tokens: int, shared: Sequence[int]) -> PromptBlocks:
        """Returns the blocks of a prompt, given the trace's numbers of its first blocks.

        The other blocks get numbers that no other prompt has.
        """
        full, rest = divmod(num_tokens, self.block_size)
        numbers = list(shared[:full])
        for _ in range(full + bool(rest) - len(numbers)):
            numbers.append(_FIRST_UNIQUE_ID + self._next % _FIRST_UNIQUE_ID)
            self._next += 1
        return self.cache.blocks_of(numbers)

    def acquire(self, owner: str, prompt: PromptBlocks) -> int | None:
        """Acquires a prompt's blocks and returns its number of cached tokens. None means too few free blocks."""
        grant = self.cache.acquire(owner, prompt, prompt.num_tokens)
        return None if grant is None else grant.cached_tokens * self.block_size

    def publish(self, owner: str, num_tokens: int) -> None:
        # Only full blocks: a partial last block is never looked up.
        self.cache.publish(owner, num_tokens // self.block_size)

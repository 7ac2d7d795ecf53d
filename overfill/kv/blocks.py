"""Owners of the blocks of a paged KV cache. Integers only; the tensors are in ``kv.cache``."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable


class BlockPool:
    """Hands out block ids and takes them back. Each block in use has one owner.

    ``acquire`` returns None if it cannot allocate, for the scheduler to act on. Not thread-safe: only the engine that
    owns the pool calls it.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        if num_blocks < 1 or block_size < 1:
            raise ValueError(f"num_blocks={num_blocks} and block_size={block_size} must both be 1 or more")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._free: deque[int] = deque(range(num_blocks))
        self._owner: list[str | None] = [None] * num_blocks

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_used(self) -> int:
        return self.num_blocks - len(self._free)

    def blocks_for(self, num_tokens: int) -> int:
        """Number of blocks needed for ``num_tokens`` tokens."""
        return -(-num_tokens // self.block_size)

    def acquire(self, owner: str, count: int) -> list[int] | None:
        """Gives ``owner`` ``count`` free blocks. Returns None, changing nothing, if fewer are free."""
        if count > len(self._free):
            return None
        blocks = [self._free.popleft() for _ in range(count)]
        for block in blocks:
            self._owner[block] = owner
        return blocks

    def release(self, owner: str, blocks: Iterable[int]) -> None:
        """Takes ``blocks`` back.

        Raises:
            ValueError: ``owner`` does not own a block, or a block is listed twice; nothing is released.
        """
        blocks = list(blocks)
        wrong = [b for b in blocks if self._owner[b] != owner]
        if wrong or len(set(blocks)) != len(blocks):
            raise ValueError(f"{owner!r} released blocks it does not own: {wrong or blocks}")
        for block in blocks:
            self._owner[block] = None
        self._free.extend(blocks)

    def owner(self, block: int) -> str | None:
        """The owner of ``block``; None if it is free."""
        return self._owner[block]

    def give(self, owner: str, block: int, to: str) -> None:
        """Transfers ``block`` from ``owner`` to ``to``. Raises ValueError if ``owner`` does not own it."""
        if self._owner[block] != owner:
            raise ValueError(f"{owner!r} cannot give block {block}, which it does not own")
        self._owner[block] = to

    def check_integrity(self) -> None:
        """Raises AssertionError unless every block is free or owned, and not both."""
        free = set(self._free)
        if len(free) != len(self._free):
            raise AssertionError("a block is free twice")
        for block, owner in enumerate(self._owner):
            if (owner is None) != (block in free):
                raise AssertionError(f"block {block} is {'lost' if owner is None else f'free and owned by {owner}'}")

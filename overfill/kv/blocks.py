"""Which block of the paged KV cache belongs to whom. Integers only; the tensors are in ``kv.cache``."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable


class BlockPool:
    """Hands out block ids and takes them back; one owner per acquire.

    "Cannot allocate" is a return value that the scheduler acts on, not an exception. Not thread-safe:
    only the engine that owns the pool calls it.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        if num_blocks < 1 or block_size < 1:
            raise ValueError(f"a pool needs blocks: num_blocks={num_blocks}, block_size={block_size}")
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
        """Blocks that hold ``num_tokens`` tokens."""
        return -(-num_tokens // self.block_size)

    def acquire(self, owner: str, count: int) -> list[int] | None:
        """``count`` free blocks for ``owner``, or None, changing nothing, when there are not that many."""
        if count > len(self._free):
            return None
        blocks = [self._free.popleft() for _ in range(count)]
        for block in blocks:
            self._owner[block] = owner
        return blocks

    def release(self, owner: str, blocks: Iterable[int]) -> None:
        """Takes ``blocks`` back.

        Raises:
            ValueError: a block is not ``owner``'s; nothing is released then.
        """
        blocks = list(blocks)
        wrong = [b for b in blocks if self._owner[b] != owner]
        if wrong or len(set(blocks)) != len(blocks):
            raise ValueError(f"{owner!r} released blocks it does not own: {wrong or blocks}")
        for block in blocks:
            self._owner[block] = None
        self._free.extend(blocks)

    def owner(self, block: int) -> str | None:
        """Who owns ``block``; None when it is free."""
        return self._owner[block]

    def give(self, owner: str, block: int, to: str) -> None:
        """Makes ``owner``'s block one of ``to``. Raises ValueError when it is not ``owner``'s."""
        if self._owner[block] != owner:
            raise ValueError(f"{owner!r} gave block {block} away, which it does not own")
        self._owner[block] = to

    def check_integrity(self) -> None:
        """Raises AssertionError unless every block is either free once or owned once."""
        free = set(self._free)
        if len(free) != len(self._free):
            raise AssertionError("a block is free twice")
        for block, owner in enumerate(self._owner):
            if (owner is None) != (block in free):
                raise AssertionError(f"block {block} is {'lost' if owner is None else f'free and owned by {owner}'}")

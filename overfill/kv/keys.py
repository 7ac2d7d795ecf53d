"""64-bit names of the full blocks of a prompt, chained, so that a key stands for all tokens up to its block's end.

Workers tell routers which keys they have (``PrefixDelta``); a router makes the same keys of a prompt. Hints only:
whoever serves KV compares tokens.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator, Sequence


def root_key(full_digest: str, dtype: str, salt: str) -> int:
    """Where the chain of keys begins: other models, element types and tenants share nothing."""
    return _hash64(f"{full_digest}\0{dtype}\0{salt}".encode())


def block_key(parent: int, tokens: Sequence[int]) -> int:
    """64-bit key of a full block of ``tokens`` after the block, or root, of key ``parent``."""
    return _hash64(struct.pack(f"<Q{len(tokens)}I", parent, *tokens))


class PromptKeys:
    """Keys of the full blocks of ``tokens``, chained from ``root``; made when asked for, and once."""

    def __init__(self, root: int, tokens: Sequence[int]) -> None:
        self._root = root
        self._tokens = tokens
        self._block_size = 0
        self._keys: list[int] = []

    def __call__(self, block_size: int) -> Iterator[int]:
        """The keys for that block size, in order."""
        if block_size != self._block_size:
            self._block_size, self._keys = block_size, []
        for index in range(len(self._tokens) // block_size):
            if index == len(self._keys):
                parent = self._keys[-1] if index else self._root
                self._keys.append(block_key(parent, self._tokens[index * block_size : (index + 1) * block_size]))
            yield self._keys[index]


def _hash64(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")

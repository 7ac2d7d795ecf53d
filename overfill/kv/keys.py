"""64-bit names of the full blocks of a prompt, chained, so that a key stands for all tokens up to its block's end.

Workers tell routers which keys they have (``PrefixDelta``); a router makes the same keys of a prompt. Hints only:
whoever serves KV compares tokens.
"""

from __future__ import annotations

import hashlib
import struct
import time
from collections.abc import Iterator, Sequence

_BLOCKS_AT_ONCE = 128
"""Blocks that are hashed before other threads get a turn."""


def root_key(full_digest: str, dtype: str, cache_namespace: str) -> int:
    """Where the chain of keys begins: other models, element types and tenants share nothing."""
    return _hash64(f"{full_digest}\0{dtype}\0{cache_namespace}".encode())


def block_key(parent: int, tokens: Sequence[int]) -> int:
    """64-bit key of a full block of ``tokens`` after the block, or root, of key ``parent``."""
    return _hash64(struct.pack(f"<Q{len(tokens)}I", parent, *tokens))


class PromptBlocks:
    """The full blocks of a prompt as the prefix cache looks for them: the tokens and the key of each.

    Making it hashes the whole prompt. Workers make it on another thread than the engine's, which only reads it.

    Args:
        root: key of the root for ``cache_namespace``; None: nothing of the prompt is shared, and nothing is hashed.
        cache_namespace: tenant whose prefixes the prompt may share.

    Attributes:
        tokens: of each full block, as little-endian 32-bit numbers. Bytes keep their hash once they have it.
        keys: of each full block, as ``block_key`` chains them.
    """

    def __init__(self, tokens: Sequence[int], block_size: int, root: int | None, cache_namespace: str) -> None:
        self.num_tokens = len(tokens)
        self.cache_namespace = cache_namespace
        self.tokens: list[bytes] = []
        self.keys: list[int] = []
        if root is None:
            return
        end, step = len(tokens) - len(tokens) % block_size, block_size * _BLOCKS_AT_ONCE
        for start in range(0, end, step):
            group = tokens[start : min(start + step, end)]
            data, width = struct.pack(f"<{len(group)}I", *group), 4 * block_size
            for index in range(0, len(data), width):
                block = data[index : index + width]
                hash(block)
                root = _hash64(root.to_bytes(8, "little") + block)
                self.tokens.append(block)
                self.keys.append(root)
            time.sleep(0)  # the engine's thread may be waiting for the interpreter


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

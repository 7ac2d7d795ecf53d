"""64-bit keys of a prompt's full blocks. Keys are chained: each one depends on all tokens up to its block's end.

Workers report the keys of their cached blocks to routers (``PrefixDelta``); a router computes the same keys from a
prompt. Keys are hints for placement. A worker compares tokens before it serves KV.
"""

from __future__ import annotations

import hashlib
import struct
import time
from collections.abc import Iterator, Sequence
from copy import copy
from typing import Self

TOKEN_BYTES = 4
"""Bytes of a token id in ``token_bytes``."""

_LOSSY = "/"
"""Between codec and tenant in a namespace of ``codec_namespace``."""

_BLOCKS_AT_ONCE = 128
"""Blocks that are hashed before the thread yields to others."""


def root_key(identity: str, cache_namespace: str) -> int:
    """The start of a chain of keys, different for each ``KvIdentity.cache_key`` and cache namespace."""
    return _hash64(f"{identity}\0{cache_namespace}".encode())


def block_key(parent: int, block: bytes) -> int:
    """64-bit key of a full block, given as ``token_bytes``, that follows the block or root with key ``parent``."""
    return _hash64(parent.to_bytes(8, "little") + block)


def codec_namespace(cache_namespace: str, codec: str) -> str:
    """The namespace of a tenant's KV that has travelled in ``codec``; for ``raw`` it is the tenant's own.

    A lossy codec changes the KV. Tenants' namespaces are hexadecimal digits, so that no tenant has another's.
    """
    return cache_namespace if codec == "raw" else f"{codec}{_LOSSY}{cache_namespace}"


def is_raw(namespace: str) -> bool:
    """True if ``namespace`` holds KV as it was computed: the inverse of ``codec_namespace``."""
    return _LOSSY not in namespace


def token_bytes(tokens: Sequence[int]) -> bytes:
    """``tokens`` as little-endian 32-bit numbers."""
    return struct.pack(f"<{len(tokens)}I", *tokens)


class PromptBlocks:
    """Tokens and key of each full block of a prompt, for lookups in the prefix cache.

    The constructor hashes the whole prompt. Workers call it on another thread than the engine's.

    Args:
        root: ``root_key`` of the namespace. None means that the prompt is not shared, and nothing is hashed.
        cache_namespace: the prompt shares prefixes with prompts of the same namespace only.

    Attributes:
        tokens: each full block's tokens, as little-endian 32-bit numbers. Python caches the hash of these bytes.
        keys: each full block's ``block_key``.
    """

    def __init__(self, tokens: Sequence[int], block_size: int, root: int | None, cache_namespace: str) -> None:
        self.num_tokens = len(tokens)
        self.cache_namespace = cache_namespace
        self.tokens: list[bytes] = []
        self.keys: list[int] = []
        self._block_size = block_size
        self._root = root
        self.append(tokens)

    def copy(self) -> Self:
        """A copy to which more can be appended; nothing is hashed again."""
        other = copy(self)
        other.tokens, other.keys = list(self.tokens), list(self.keys)
        return other

    def beginning(self, num_blocks: int) -> Self:
        """A copy with the first ``num_blocks`` full blocks only. Nothing may be appended to it."""
        other = copy(self)
        other.tokens, other.keys = self.tokens[:num_blocks], self.keys[:num_blocks]
        other.num_tokens = min(self.num_tokens, num_blocks * self._block_size)
        return other

    def append(self, tokens: Sequence[int]) -> None:
        """Adds the full blocks of ``tokens``, which follow the last full block. No other thread may use ``self``."""
        if self._root is None:
            return
        key = self.keys[-1] if self.keys else self._root
        block_size = self._block_size
        end, step = len(tokens) - len(tokens) % block_size, block_size * _BLOCKS_AT_ONCE
        for start in range(0, end, step):
            group = tokens[start : min(start + step, end)]
            data, width = token_bytes(group), TOKEN_BYTES * block_size
            for index in range(0, len(data), width):
                block = data[index : index + width]
                hash(block)
                key = block_key(key, block)
                self.tokens.append(block)
                self.keys.append(key)
            if start + step < end:
                time.sleep(0)  # the engine's thread may be waiting for the interpreter lock


class PromptKeys:
    """Keys of the full blocks of ``tokens``, chained from ``root``. Each is computed on first use and kept.

    Keys for different block sizes are kept side by side, because the workers of a pool may differ in block size.
    """

    def __init__(self, root: int, tokens: Sequence[int]) -> None:
        self._root = root
        self._tokens = tokens
        self._data = b""
        self._keys: dict[int, list[int]] = {}

    def __call__(self, block_size: int) -> Iterator[int]:
        """Yields the keys for blocks of ``block_size`` tokens, in order."""
        self._data = self._data or token_bytes(self._tokens)
        data, width, keys = self._data, TOKEN_BYTES * block_size, self._keys.setdefault(block_size, [])
        for index in range(len(data) // width):
            if index == len(keys):
                parent = keys[-1] if index else self._root
                keys.append(block_key(parent, data[index * width : (index + 1) * width]))
            yield keys[index]

    def fill(self, block_size: int) -> None:
        """Computes the keys of all blocks of ``block_size`` tokens. Call it on another thread than the event loop's."""
        for index, _ in enumerate(self(block_size)):
            if index % _BLOCKS_AT_ONCE == 0:
                time.sleep(0)  # the event loop's thread may be waiting for the interpreter lock


def _hash64(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")

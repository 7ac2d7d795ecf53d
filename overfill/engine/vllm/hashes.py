"""Hashes under which vLLM's prefix cache knows blocks. They decide who may share a block, and so whose KV is read.

vLLM would hash every full block by its tokens, answers included. A later turn of a chat contains the answer in its
prompt, and would be given KV that the *decoder* wrote. Here only blocks before ``answer_start`` have a hash that
others can have; each block that holds a token that the decoder computes has one that no other sequence has. So no
sequence reads KV of another adapter. Where the decoder is the reader, the engine gives an answer's blocks the hashes of
a prompt with the same tokens when the answer ends (``HashedPrompt.append``).
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Callable, Sequence
from typing import Any

from overfill.kv.keys import PromptBlocks

_HASH_BYTES = 32
_KEY_BYTES = 8
NO_KEY = 0
"""What vLLM reports in place of a key for a block that no other sequence can share."""


class HashedPrompt(PromptBlocks):
    """A prompt's full blocks with the hashes under which vLLM may share them.

    Attributes:
        hashes: 32 bytes each, chained from the prompt's cache namespace. A hash ends in the block's key (``kv.keys``),
            which is what vLLM reports of it in events and what routers know it by.
    """

    def __init__(self, tokens: Sequence[int], block_size: int, root: int | None, cache_namespace: str) -> None:
        self.hashes: list[bytes] = []
        self._chain = hashlib.sha256(cache_namespace.encode()).digest()
        super().__init__(tokens, block_size, root, cache_namespace)

    def copy(self) -> HashedPrompt:
        other = super().copy()
        other.hashes = list(self.hashes)
        return other

    def beginning(self, num_blocks: int) -> HashedPrompt:
        other = super().beginning(num_blocks)
        other.hashes = self.hashes[:num_blocks]
        return other

    def append(self, tokens: Sequence[int]) -> None:
        super().append(tokens)
        begin = len(self.hashes)
        for block, key in zip(self.tokens[begin:], self.keys[begin:], strict=True):
            self._chain = hashlib.sha256(self._chain + block).digest()
            self.hashes.append(self._chain[:-_KEY_BYTES] + key.to_bytes(_KEY_BYTES, "big"))


def hashes_of(prompt: PromptBlocks | None) -> list[bytes]:
    """The hashes under which vLLM may share a prompt's full blocks; none if the servicer did not hash the prompt."""
    return prompt.hashes if isinstance(prompt, HashedPrompt) else []


def block_hasher(prompt: PromptBlocks | None, num_shared: int, block_size: int) -> Callable[[Any], list[bytes]]:
    """A request's block hasher, as vLLM wants it: returns hashes of the full blocks that have none yet.

    Args:
        prompt: the prompt as the servicer hashed it; None shares nothing.
        num_shared: number of leading blocks that other requests may share.
    """
    shared = hashes_of(prompt)[:num_shared]
    secret = secrets.randbits(8 * (_HASH_BYTES - _KEY_BYTES) - 1)  # the index is added to it

    def hash_new_blocks(request: Any) -> list[bytes]:
        begin, end = len(request.block_hashes), request.num_tokens // block_size
        return [shared[index] if index < len(shared) else _secret_hash(secret + index) for index in range(begin, end)]

    return hash_new_blocks


def _secret_hash(secret: int) -> bytes:
    return secret.to_bytes(_HASH_BYTES - _KEY_BYTES, "big") + NO_KEY.to_bytes(_KEY_BYTES, "big")

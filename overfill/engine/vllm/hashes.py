"""Hashes under which vLLM's prefix cache knows blocks. They decide who may share a block, and so whose KV is read.

vLLM would hash every full block by its tokens, answers included. A later turn of a chat contains the answer in its
prompt, and would be given KV that the *decoder* wrote. Here only blocks of a prompt have a hash that others can have;
each block that holds a token of an answer has one that no other sequence has.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Callable
from typing import Any

from overfill.kv.keys import PromptBlocks

_KEY_BYTES = 8


def prompt_hashes(prompt: PromptBlocks, num_blocks: int) -> list[bytes]:
    """Hashes of the first ``num_blocks`` full blocks, 32 bytes each, chained from the prompt's cache namespace.

    A hash ends in the block's key (``kv.keys``), which is what vLLM reports of it in events and routers know it by.
    """
    chain = hashlib.sha256(prompt.cache_namespace.encode()).digest()
    hashes = []
    for tokens, key in zip(prompt.tokens[:num_blocks], prompt.keys[:num_blocks], strict=True):
        chain = hashlib.sha256(chain + tokens).digest()
        hashes.append(chain[:-_KEY_BYTES] + key.to_bytes(_KEY_BYTES, "big"))
    return hashes


def block_hasher(prompt: PromptBlocks, num_shared: int, block_size: int) -> Callable[[Any], list[bytes]]:
    """A request's block hasher, as vLLM wants it: returns hashes of the full blocks that have none yet.

    Args:
        num_shared: number of leading blocks that other requests may share.
    """
    shared = prompt_hashes(prompt, min(num_shared, len(prompt.tokens)))
    secret = secrets.token_bytes(16)

    def hash_new_blocks(request: Any) -> list[bytes]:
        begin, end = len(request.block_hashes), request.num_tokens // block_size
        return [
            shared[index] if index < len(shared) else hashlib.sha256(secret + index.to_bytes(8, "big")).digest()
            for index in range(begin, end)
        ]

    return hash_new_blocks

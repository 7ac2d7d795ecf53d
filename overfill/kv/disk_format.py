"""What a file of the disk tier is: one block of a prompt's KV, as a message of KV chunks that travels nowhere.

Its name has the block's 64-bit key, which routers know, and a 256-bit hash of the format, the KV's identity, geometry
and block size, the cache namespace, and all tokens up to the block's end. Half of this hash is the chunks' transfer
id, so that their checksums cover what the KV is, and not only its bytes.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence

from overfill.errors import TransferFailed
from overfill.kv.chunks import TRANSFER_ID_BYTES, TransferSpec, check_head, new_chunk, wrong_checksum
from overfill.kv.handshake import KvIdentity
from overfill.kv.keys import PromptBlocks
from overfill.kv.ranges import Coverage, KvRange
from overfill.kv.sender import read_message
from overfill.kv.store import DeviceEvent, KvStore, LayerTargets
from overfill.kv.wire import parse_message
from overfill.rpc.constants import MAX_CHUNK_PAYLOAD

FORMAT_VERSION = 1
"""Files of another version are not found, and evicted as others are."""

_FRAMING_BYTES = 256
"""More than what a chunk takes in its message besides its payload."""

_HASHED_AT_ONCE = 128
"""Blocks that are hashed before the thread yields to others."""


class BlockFormat:
    """Names and contents of the files with the KV of ``store``. Any thread may call it.

    Args:
        identity: what the KV must be, besides its shape ``identity.kv``.
        store: blocks with all layers and heads of the full model.

    Attributes:
        block_size: tokens per block.
        max_bytes: limit on the bytes of a file.
    """

    def __init__(self, identity: KvIdentity, store: KvStore) -> None:
        self.block_size = store.block_size
        self._store = store
        self._kv = identity.kv
        self._layers = tuple(range(self._kv.num_layers))
        self._targets = LayerTargets({layer: [layer] for layer in self._layers})
        described = [FORMAT_VERSION, identity.cache_key, self._kv.flat(), self.block_size]
        self._root = _hash(json.dumps(described).encode())
        num_chunks = len(self._ranges((0, self.block_size)))
        self.max_bytes = self._kv.token_bytes * self.block_size + _FRAMING_BYTES * num_chunks

    def names(self, prompt: PromptBlocks, end: int) -> list[str]:
        """Names of the files of the prompt's first ``end`` blocks."""
        chain, names = _hash(self._root + prompt.cache_namespace.encode()), []
        for index, (key, tokens) in enumerate(zip(prompt.keys[:end], prompt.tokens, strict=False)):
            chain = _hash(chain + tokens)
            names.append(f"{key:016x}-{chain.hex()}")
            if index % _HASHED_AT_ONCE == 0:
                time.sleep(0)
        return names

    def content(self, name: str, index: int, blocks: Sequence[int], event: DeviceEvent | None) -> bytes:
        """Reads the block with index ``index`` of the block table ``blocks`` from the store, after ``event``."""
        spec = self._spec(name, index)
        chunks = [new_chunk(spec, kv_range) for kv_range in self._ranges(spec.tokens)]
        return read_message(spec, self._store, blocks, chunks, dict.fromkeys(self._layers, event))

    def place(self, name: str, index: int, content: bytes, blocks: Sequence[int]) -> None:
        """Writes a file's content into the block with index ``index`` of the block table ``blocks``.

        Raises:
            TransferFailed: it is not the KV of its name, or is damaged. The block's content is then undefined.
        """
        spec = self._spec(name, index)
        coverage = Coverage(self._layers, spec.tokens, (0, self._kv.num_kv_heads))
        chunks = [check_head(spec, chunk) for chunk in parse_message(content)]
        for chunk in chunks:
            coverage.add(chunk.range)
        if not coverage.complete:
            raise TransferFailed(f"{coverage.missing_vectors} key and value vectors are missing")
        if (written := self._store.write(blocks, self._targets, chunks)) < len(chunks):
            raise wrong_checksum(chunks[written].range)

    def _spec(self, name: str, index: int) -> TransferSpec:
        """What the chunks of a block are, as those of a transfer."""
        chain = bytes.fromhex(name.partition("-")[2])
        tokens = index * self.block_size, (index + 1) * self.block_size
        return TransferSpec(chain[:TRANSFER_ID_BYTES], 0, self._kv, self._layers, tokens)

    def _ranges(self, tokens: tuple[int, int]) -> list[KvRange]:
        """The chunks of a block: all layers and heads, each at most ``MAX_CHUNK_PAYLOAD`` bytes."""
        start, end = tokens
        per_chunk = max(1, MAX_CHUNK_PAYLOAD // self._kv.token_layer_bytes)  # tokens times layers
        num_tokens = min(end - start, per_chunk)
        num_layers = per_chunk // num_tokens
        return [
            KvRange(
                layer,
                min(layer + num_layers, len(self._layers)),
                token,
                min(token + num_tokens, end),
                0,
                self._kv.num_kv_heads,
            )
            for layer in range(0, len(self._layers), num_layers)
            for token in range(start, end, num_tokens)
        ]


def key_of(name: str) -> int:
    """The routers' key in a file's name."""
    return int(name.partition("-")[0], 16)


def _hash(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=32).digest()

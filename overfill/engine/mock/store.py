"""The KV cache of a mock engine: every key of a token is its id, and every value its position. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from overfill.kv.chunks import Chunk, digest, num_undamaged
from overfill.kv.spec import DTYPE_BYTES, KvSpec
from overfill.kv.store import DeviceEvent, LayerTargets
from overfill.v1 import common_pb2

_ELEMENTS: dict[int, type[np.unsignedinteger[Any]]] = {2: np.uint16, 4: np.uint32}


class MockKvStore:
    """Ids and positions of the tokens in all blocks. What is read has the geometry and the bytes of ``spec``.

    All elements of a token's keys are equal, and all of its values, so one of each is stored.

    Attributes:
        k, v: [num_blocks * block_size], unsigned integers of the size of ``spec.dtype``.
    """

    codec = common_pb2.KV_CODEC_RAW

    def __init__(self, spec: KvSpec, num_blocks: int, block_size: int) -> None:
        self.spec = spec
        self.block_size = block_size
        element = _ELEMENTS[DTYPE_BYTES[spec.dtype]]
        self.k, self.v = (np.zeros(num_blocks * block_size, element) for _ in range(2))

    def slots(self, block_table: Sequence[int], start: int, end: int) -> NDArray[np.int64]:
        """Slots of tokens ``start..end`` of a sequence. [end - start]"""
        size, first = self.block_size, start // self.block_size
        blocks = np.array(block_table[first : -(-end // size)], np.int64)
        return (blocks[:, None] * size + np.arange(size)).reshape(-1)[start - first * size : end - first * size]

    def put(self, block_table: Sequence[int], tokens: Sequence[int], start: int) -> None:
        """Writes the KV of ``tokens`` at positions from ``start`` on."""
        slots = self.slots(block_table, start, start + len(tokens))
        self.k[slots] = np.array(tokens, np.int64).astype(self.k.dtype)
        self.v[slots] = np.arange(start, start + len(tokens)).astype(self.v.dtype)

    def holds(self, block_table: Sequence[int], tokens: Sequence[int]) -> bool:
        """True if the blocks hold the KV of ``tokens`` from position 0 on."""
        slots = self.slots(block_table, 0, len(tokens))
        keys, values = np.array(tokens, np.int64).astype(self.k.dtype), np.arange(len(tokens)).astype(self.v.dtype)
        return bool((self.k[slots] == keys).all() and (self.v[slots] == values).all())

    def read(
        self, block_table: Sequence[int], chunks: Sequence[Chunk], after: Mapping[int, DeviceEvent | None]
    ) -> None:
        """Fills the payloads and checksums of ``chunks``; see ``KvStore``."""
        for chunk in chunks:
            slots, elements = self.slots(block_table, *chunk.range.tokens), self._elements(chunk)
            elements[0], elements[1] = self.k[slots, None], self.v[slots, None]
            if chunk.header:
                chunk.checksum = digest(chunk.header, chunk.payload)

    def write(self, block_table: Sequence[int], targets: LayerTargets, chunks: Sequence[Chunk]) -> int:
        """Writes chunks up to the first damaged one and returns how many; see ``KvStore``."""
        undamaged = num_undamaged(chunks)
        for chunk in chunks[:undamaged]:
            slots, elements = self.slots(block_table, *chunk.range.tokens), self._elements(chunk)
            self.k[slots], self.v[slots] = elements[:, -1, :, -1]
        return undamaged

    def _elements(self, chunk: Chunk) -> NDArray[Any]:
        """The payload as [2, layers, tokens, heads * head_dim]."""
        kv_range = chunk.range
        shape = (2, kv_range.num_layers, kv_range.num_tokens, kv_range.num_heads * self.spec.head_dim)
        return np.frombuffer(chunk.payload, self.k.dtype).reshape(shape)

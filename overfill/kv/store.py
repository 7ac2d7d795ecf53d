"""What the two ends of a handoff need of a KV cache. Every engine's cache has it; no engine is named here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from overfill.kv.chunks import Chunk
from overfill.kv.tensors import DeviceEvent, LayerTargets
from overfill.v1 import common_pb2


class KvStore(Protocol):
    """Blocks of KV, read by the sender and written by the receiver, from any thread and beside a running step.

    Chunks are as on the wire: keys after RoPE at absolute positions, ``[2, layers, tokens, kv_heads, head_dim]``.
    """

    @property
    def block_size(self) -> int:
        """Tokens per block."""
        ...

    @property
    def codec(self) -> common_pb2.KvCodec:
        """Chunks in this codec are stored unchanged; ``write`` takes them and raw ones."""
        ...

    def read(
        self, block_table: Sequence[int], chunks: Sequence[Chunk], after: Mapping[int, DeviceEvent | None]
    ) -> None:
        """Fills the payloads of ``chunks``, and the checksums of those that have a header; as ``PagedTensors.read``."""
        ...

    def write(self, block_table: Sequence[int], targets: LayerTargets, chunks: Sequence[Chunk]) -> int:
        """Writes chunks up to the first damaged one and returns how many; as ``PagedTensors.write``."""
        ...

"""What the two ends of a handoff need of a KV cache. Every engine's cache has it; no engine is named here. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Protocol, TypeAlias

import numpy as np

from overfill.kv.chunks import Chunk
from overfill.v1 import common_pb2

if TYPE_CHECKING:
    import torch

DeviceEvent: TypeAlias = "torch.cuda.Event"
"""A point in a device's work. In its place, None means that the work is done, as it always is on the CPU."""


class LayerTargets:
    """For each full-model layer, the layers of a cache that store it.

    Args:
        targets: full-model layer -> cache layers; layers that are left out are stored nowhere.
    """

    def __init__(self, targets: Mapping[int, Sequence[int]]) -> None:
        stored = [targets.get(layer, ()) for layer in range(max(targets) + 1)]
        self.starts = np.cumsum([0, *map(len, stored)], dtype=np.int64)
        self.targets = np.array([target for of_layer in stored for target in of_layer], dtype=np.int64)

    def __getitem__(self, layer: int) -> Sequence[int]:
        return self.targets[self.starts[layer] : self.starts[layer + 1]].tolist()  # type: ignore[no-any-return]


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
        """Fills the payloads of ``chunks``, and the checksums of those that have a header; as ``PagedTensors.read``.

        A chunk with room for scales, which has no header, is read in the store's ``codec``, others raw.
        """
        ...

    def write(self, block_table: Sequence[int], targets: LayerTargets, chunks: Sequence[Chunk]) -> int:
        """Writes chunks up to the first damaged one and returns how many; as ``PagedTensors.write``."""
        ...

"""The paged KV cache: two tensors, addressed by slot.

Token ``t`` of a sequence with block table ``table`` lives in slot
``table[t // block_size] * block_size + t % block_size``. ``kv.int8_cache`` holds the same in half the bytes.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import ClassVar

import torch

from overfill.kv.cells import Cells, DeviceEvent, slots_of
from overfill.kv.native.library import Rows
from overfill.kv.pieces import Piece
from overfill.kv.spec import KvSpec
from overfill.kv.wire import Buffer
from overfill.v1 import common_pb2

TORCH_DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


class KvCache:
    """Keys and values of all blocks.

    ``read`` and ``write`` may be called from any thread, beside a running step: they use a stream of their own.

    Attributes:
        k, v: [num_layers, num_blocks, block_size, num_kv_heads, head_dim], ``held_as``. Keys are post-RoPE.
        spec: of what travels and is computed with, however it is held.
    """

    codec: ClassVar[common_pb2.KvCodec] = common_pb2.KV_CODEC_RAW
    """What is held as it travels in this codec: its chunks are written as they come."""

    def __init__(self, spec: KvSpec, num_blocks: int, block_size: int, device: torch.device) -> None:
        self.spec = spec
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.device = device
        self.k, self.v = (self._zeros(self.held_as, spec.head_dim) for _ in range(2))
        self._cells = Cells(self.k, self.v)

    @property
    def held_as(self) -> torch.dtype:
        """Element type of ``k`` and ``v``."""
        return TORCH_DTYPES[self.spec.dtype]

    @property
    def lossless(self) -> bool:
        """Whether what is put in comes out as it was."""
        return self.codec == common_pb2.KV_CODEC_RAW

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's keys and values in all layers, as they are held."""
        return self.spec.token_bytes

    @property
    def gathered_layer_bytes(self) -> int:
        """Bytes that ``gather`` takes for each token, of what it makes on the way too."""
        return self.spec.token_layer_bytes

    @property
    def block_bytes(self) -> int:
        return self.token_bytes * self.block_size

    def slots(self, block_table: Sequence[int], start: int, end: int) -> torch.Tensor:
        """Slots of tokens ``start..end`` of a sequence. [end - start], int64, on the cache's device."""
        return slots_of(block_table, start, end, self.block_size, self.device)

    def layer(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """``k`` and ``v`` of one layer, each [num_slots, num_kv_heads, head_dim], as views."""
        return self._cells.layer(index)

    def put(self, layer: int, slots: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        """Writes new tokens' keys and values, each [len(slots), num_kv_heads, head_dim], in the current stream."""
        for flat, new in zip(self.layer(layer), (k, v), strict=True):
            flat.index_copy_(0, slots, new)

    def gather(
        self, layer: int, slots: torch.Tensor, room: tuple[torch.Tensor, torch.Tensor] | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of ``slots`` in one layer, each [len(slots), num_kv_heads, head_dim] of ``spec.dtype``.

        Args:
            room: where to put them; None takes fresh memory.
        """
        k, v = self.layer(layer)
        k_room, v_room = room or (None, None)
        return torch.index_select(k, 0, slots, out=k_room), torch.index_select(v, 0, slots, out=v_room)

    def new_room(self, count: int) -> torch.Tensor:
        """Room for ``count`` tokens' keys or values, as ``gather`` gives them."""
        shape = (count, self.spec.num_kv_heads, self.spec.head_dim)
        return torch.empty(shape, dtype=TORCH_DTYPES[self.spec.dtype], device=self.device)

    def read(
        self,
        block_table: Sequence[int],
        layers: Sequence[int],
        tokens: tuple[int, int],
        heads: tuple[int, int],
        after: DeviceEvent | None = None,
        out: memoryview | None = None,
    ) -> memoryview:
        """Keys then values of one sequence, each [layers, tokens, heads, head_dim] of ``spec.dtype``, as bytes.

        Arguments as ``Cells.read`` takes them.
        """
        return self._cells.read(block_table, layers, tokens, heads, after, out)

    def write(
        self,
        block_table: Sequence[int],
        rows: Sequence[Sequence[int]],
        tokens: tuple[int, int],
        heads: tuple[int, int],
        payload: Buffer,
    ) -> None:
        """Writes what ``read`` gave; arguments as ``Cells.write`` takes them."""
        self._cells.write(block_table, rows, tokens, heads, payload)

    def read_pieces(
        self, block_table: Sequence[int], pieces: Sequence[Piece], after: Mapping[int, DeviceEvent | None]
    ) -> None:
        """As ``Cells.read_pieces``."""
        self._cells.read_pieces(block_table, pieces, after)

    def write_pieces(self, block_table: Sequence[int], rows: Rows, pieces: Sequence[Piece]) -> int:
        """As ``Cells.write_pieces``."""
        return self._cells.write_pieces(block_table, rows, pieces)

    def _zeros(self, dtype: torch.dtype, width: int) -> torch.Tensor:
        """[num_layers, num_blocks, block_size, num_kv_heads, width] zeros.

        On a Linux CPU in huge pages: attention jumps from block to block, and finding 4 KiB pages costs more time than
        reading them.
        """
        shape = (self.spec.num_layers, self.num_blocks, self.block_size, self.spec.num_kv_heads, width)
        size = math.prod(shape) * dtype.itemsize
        if self.device.type != "cpu" or not hasattr(mmap, "MADV_HUGEPAGE") or size == 0:
            return torch.zeros(shape, dtype=dtype, device=self.device)
        memory = mmap.mmap(-1, size)
        with suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE)
        return torch.frombuffer(memory, dtype=dtype).view(shape)


def copy_sequence(
    source: KvCache,
    source_blocks: Sequence[int],
    target: KvCache,
    target_blocks: Sequence[int],
    layer_map: Sequence[int],
    num_tokens: int,
) -> None:
    """Copies a sequence's first ``num_tokens`` tokens between caches of one process.

    ``layer_map[i]`` is the source layer that target layer i takes.
    """
    taken = source.slots(source_blocks, 0, num_tokens)
    placed = target.slots(target_blocks, 0, num_tokens)
    for row, layer in enumerate(layer_map):
        target.put(row, placed, *source.gather(layer, taken))

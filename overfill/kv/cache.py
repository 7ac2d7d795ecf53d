"""The paged KV cache: two tensors, addressed by slot.

Token ``t`` of a sequence with block table ``table`` lives in slot
``table[t // block_size] * block_size + t % block_size``.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress

import torch

from overfill.kv.host import HostCells
from overfill.kv.native import library
from overfill.kv.native.library import NativeCells, Rows
from overfill.kv.pieces import Piece, digest, first_damaged
from overfill.kv.spec import KvSpec
from overfill.kv.wire import Buffer

TORCH_DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


# A mark in a device's work; None on the CPU, where work is done when the call returns.
DeviceEvent = torch.cuda.Event


class KvCache:
    """Keys and values of all blocks.

    ``read`` and ``write`` may be called from any thread, beside a running step: they use a stream of their own.

    Attributes:
        k, v: [num_layers, num_blocks, block_size, num_kv_heads, head_dim], ``spec.dtype``. Keys are post-RoPE.
    """

    def __init__(self, spec: KvSpec, num_blocks: int, block_size: int, device: torch.device) -> None:
        self.spec = spec
        self.num_blocks = num_blocks
        self.block_size = block_size
        shape = (spec.num_layers, num_blocks, block_size, spec.num_kv_heads, spec.head_dim)
        self.k, self.v = (_zeros(shape, TORCH_DTYPES[spec.dtype], device) for _ in range(2))
        self._io_stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._host = HostCells(self.k, self.v) if device.type == "cpu" else None
        native = library.load() if device.type == "cpu" else None
        self._native = NativeCells(native, self.k, self.v) if native is not None else None

    @property
    def block_bytes(self) -> int:
        return self.spec.token_bytes * self.block_size

    def slots(self, block_table: Sequence[int], start: int, end: int) -> torch.Tensor:
        """Slots of tokens ``start..end`` of a sequence. [end - start], int64, on the cache's device."""
        table = torch.tensor(block_table, dtype=torch.int64)
        positions = torch.arange(start, end, dtype=torch.int64)
        slots = table[positions // self.block_size] * self.block_size + positions % self.block_size
        return slots.to(self.k.device)

    def layer(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of one layer, each [num_slots, num_kv_heads, head_dim], as views."""
        shape = (self.num_blocks * self.block_size, self.spec.num_kv_heads, self.spec.head_dim)
        return self.k[index].view(shape), self.v[index].view(shape)

    def read(
        self,
        block_table: Sequence[int],
        layers: Sequence[int],
        tokens: tuple[int, int],
        heads: tuple[int, int],
        after: DeviceEvent | None = None,
        out: memoryview | None = None,
    ) -> memoryview:
        """Keys then values of one sequence, each [layers, tokens, heads, head_dim], as bytes; ranges are half-open.

        Args:
            after: marks the moment from which the cells hold what is wanted.
            out: where to put them, when it has the right length; None takes fresh memory.
        """
        if self._host is not None:
            return self._host.read(block_table, layers, tokens, heads, out)
        with self._io():
            if self._io_stream is not None and after is not None:
                self._io_stream.wait_event(after)
            slots = self.slots(block_table, *tokens)
            shape = (2, len(layers), slots.numel(), heads[1] - heads[0], self.spec.head_dim)
            gathered = torch.empty(shape, dtype=self.k.dtype, device=self.k.device)
            for i, layer in enumerate(layers):
                for half, flat in enumerate(self.layer(layer)):
                    torch.index_select(flat[:, heads[0] : heads[1]], 0, slots, out=gathered[half, i])
            # Through a byte view, since numpy knows no bfloat16.
            data = gathered.view(torch.uint8).cpu().numpy().reshape(-1).data
        if out is None:
            return data
        out[:] = data
        return out

    def write(
        self,
        block_table: Sequence[int],
        rows: Sequence[Sequence[int]],
        tokens: tuple[int, int],
        heads: tuple[int, int],
        payload: Buffer,
    ) -> None:
        """Writes keys then values, each [len(rows), tokens, heads, head_dim], as ``read`` gave them.

        Args:
            rows: for each layer of the payload, the layers of this cache that take it.
            heads: half-open range of KV heads that the payload covers.
        """
        if self._host is not None:
            self._host.write(block_table, rows, tokens, heads, payload)
            return
        with self._io():
            slots = self.slots(block_table, *tokens)
            shape = (2, len(rows), slots.numel(), heads[1] - heads[0], self.spec.head_dim)
            # A copy: torch refuses to look at a read-only buffer without a warning.
            data = torch.frombuffer(bytearray(payload), dtype=self.k.dtype).view(shape).to(self.k.device)
            for i, targets in enumerate(rows):
                for row in targets:
                    for half, flat in enumerate(self.layer(row)):
                        flat[:, heads[0] : heads[1]].index_copy_(0, slots, data[half, i])
        if self._io_stream is not None:
            self._io_stream.synchronize()

    def read_pieces(
        self, block_table: Sequence[int], pieces: Sequence[Piece], after: Mapping[int, DeviceEvent | None]
    ) -> None:
        """Fills the payloads of ``pieces``, which are writable, and the checksums of those that have a header.

        Args:
            after: per layer, as in ``read``; layers are computed in order.
        """
        if self._native is not None:
            self._native.read(block_table, pieces)
            return
        for piece in pieces:
            box = piece.box
            layers = range(box.layer_start, box.layer_end)
            tokens, heads = (box.token_start, box.token_end), (box.head_start, box.head_end)
            self.read(block_table, layers, tokens, heads, after.get(layers[-1]), memoryview(piece.payload))
            if piece.header:
                piece.checksum = digest(piece.header, piece.payload)

    def write_pieces(self, block_table: Sequence[int], rows: Rows, pieces: Sequence[Piece]) -> int:
        """Writes pieces of a full model's KV, and checks those that have a header.

        Args:
            rows: where its layers go.

        Returns:
            How many of them, from the first, are in place. When that is not all, the next one is damaged, and what its
            box holds is void.
        """
        if self._native is not None:
            return self._native.write(block_table, rows, pieces)
        whole = first_damaged(pieces)
        for piece in pieces[:whole]:
            box = piece.box
            targets = [rows[layer] for layer in range(box.layer_start, box.layer_end)]
            tokens, heads = (box.token_start, box.token_end), (box.head_start, box.head_end)
            self.write(block_table, targets, tokens, heads, piece.payload)
        return whole

    def _io(self) -> AbstractContextManager[object]:
        return nullcontext() if self._io_stream is None else torch.cuda.stream(self._io_stream)


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Zeros; on a Linux CPU in huge pages: attention jumps from block to block, and finding 4 KiB pages costs more
    time than reading them."""
    size = math.prod(shape) * dtype.itemsize
    if device.type != "cpu" or not hasattr(mmap, "MADV_HUGEPAGE") or size == 0:
        return torch.zeros(shape, dtype=dtype, device=device)
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
        for source_half, target_half in zip(source.layer(layer), target.layer(row), strict=True):
            target_half.index_copy_(0, placed, source_half.index_select(0, taken))

"""Storage of a KV cache: a tensor of keys and one of values, whose ranges are copied out and in as bytes.

``NumpyTensors`` are in host memory; ``kv.native.library`` has the same with native code. ``DeviceTensors`` are on any
other device and are copied beside its steps.
"""

from __future__ import annotations

import math
import mmap
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Any, TypeAlias, get_args

import numpy as np
import torch

from overfill.kv.chunks import Chunk, digest, num_undamaged
from overfill.kv.spec import DTypeName
from overfill.kv.store import DeviceEvent, LayerTargets

TORCH_DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}

_DTYPE_NAMES: dict[torch.dtype, DTypeName] = {TORCH_DTYPES[name]: name for name in get_args(DTypeName)}

_Ids: TypeAlias = "np.ndarray[Any, np.dtype[np.int64]]"


def dtype_name(dtype: torch.dtype) -> DTypeName:
    """The name of one of ``TORCH_DTYPES``."""
    return _DTYPE_NAMES[dtype]


def slots_of(block_table: Sequence[int], start: int, end: int, block_size: int, device: torch.device) -> torch.Tensor:
    """Slots of tokens ``start..end`` of a sequence. [end - start], int64, on ``device``."""
    table = torch.tensor(block_table, dtype=torch.int64)
    positions = torch.arange(start, end, dtype=torch.int64)
    return (table[positions // block_size] * block_size + positions % block_size).to(device)


def zeros(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Zeros of ``shape``. On a Linux CPU they are in huge pages.

    Attention jumps from block to block, and looking up 4 KiB pages would take longer than reading them.
    """
    size = math.prod(shape) * dtype.itemsize
    if device.type != "cpu" or not hasattr(mmap, "MADV_HUGEPAGE") or size == 0:
        return torch.zeros(*shape, dtype=dtype, device=device)
    memory = mmap.mmap(-1, size)
    with suppress(OSError):  # a kernel without huge pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(*shape)


class PagedTensors(ABC):
    """Keys and values of all blocks. An element is a number, a code or a scale.

    ``read`` and ``write`` may be called from any thread, beside a running step.

    Attributes:
        k, v: [num_layers, num_blocks, block_size, num_kv_heads, width], of one dtype and device.
    """

    def __init__(self, k: torch.Tensor, v: torch.Tensor) -> None:
        self.k, self.v = k, v
        self.block_size = k.shape[2]

    def layer(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Views of one layer's keys and values, each [num_slots, num_kv_heads, width]."""
        return self.k[index].flatten(0, 1), self.v[index].flatten(0, 1)

    def read(
        self, block_table: Sequence[int], chunks: Sequence[Chunk], after: Mapping[int, DeviceEvent | None]
    ) -> None:
        """Fills the payloads of ``chunks``, which are writable, and the checksums of those that have a header.

        Args:
            after: per layer, the event after which its elements may be read. Layers are computed in order.
        """
        for chunk in chunks:
            self._copy_out(block_table, chunk, after.get(chunk.range.layer_end - 1))
            if chunk.header:
                chunk.checksum = digest(chunk.header, chunk.payload)

    def write(self, block_table: Sequence[int], targets: LayerTargets, chunks: Sequence[Chunk]) -> int:
        """Writes chunks of a full model's KV and checks those that have a header.

        Args:
            targets: the layers of this cache that each full-model layer is written to.

        Returns:
            Number of leading chunks that were written. If it is smaller than ``len(chunks)``, the next chunk is damaged
            and the cache elements of its range are undefined.
        """
        undamaged = num_undamaged(chunks)
        for chunk in chunks[:undamaged]:
            self._copy_in(block_table, targets, chunk)
        return undamaged

    @abstractmethod
    def _copy_out(self, block_table: Sequence[int], chunk: Chunk, after: DeviceEvent | None) -> None:
        """Fills the payload of ``chunk`` once ``after`` has passed."""

    @abstractmethod
    def _copy_in(self, block_table: Sequence[int], targets: LayerTargets, chunk: Chunk) -> None:
        """Writes the payload of ``chunk``; its elements are in place on return."""


class NumpyTensors(PagedTensors):
    """In host memory: one copy at the speed of memory, while other threads run.

    Whole blocks are copied as rows of several KiB, the rest token by token.
    """

    def __init__(self, k: torch.Tensor, v: torch.Tensor) -> None:
        super().__init__(k, v)
        layers, blocks, _, self._num_heads, width = k.shape
        self._vector_bytes = width * k.element_size()  # of one token
        flat = [half.view(torch.uint8).numpy().reshape(layers, -1) for half in (k, v)]
        self._blocks = [half.reshape(layers, blocks, -1) for half in flat]
        self._tokens = [half.reshape(layers, blocks * self.block_size, -1) for half in flat]

    def _copy_out(self, block_table: Sequence[int], chunk: Chunk, after: DeviceEvent | None) -> None:
        view, partial, columns = self._view(chunk)
        whole, blocks, slots = self._split(block_table, chunk.range.tokens, partial)
        for half in (0, 1):
            for target, layer in zip(view[half], chunk.range.layers, strict=True):
                if partial:
                    target[:] = self._tokens[half][layer][slots, columns]
                    continue
                if whole:
                    # Mode "clip" copies straight into ``out``; every id is in range.
                    rows = target[:whole].reshape(len(blocks), -1)
                    np.take(self._blocks[half][layer], blocks, axis=0, out=rows, mode="clip")
                if whole < len(target):
                    np.take(self._tokens[half][layer], slots, axis=0, out=target[whole:], mode="clip")

    def _copy_in(self, block_table: Sequence[int], targets: LayerTargets, chunk: Chunk) -> None:
        view, partial, columns = self._view(chunk)
        whole, blocks, slots = self._split(block_table, chunk.range.tokens, partial)
        for half in (0, 1):
            for source, layer in zip(view[half], chunk.range.layers, strict=True):
                for target in targets[layer]:
                    if partial:
                        self._tokens[half][target][slots, columns] = source
                        continue
                    if whole:
                        self._blocks[half][target][blocks] = source[:whole].reshape(len(blocks), -1)
                    if whole < len(source):
                        self._tokens[half][target][slots] = source[whole:]

    def _view(self, chunk: Chunk) -> tuple[np.ndarray[Any, np.dtype[np.uint8]], bool, slice]:
        """The payload as [2, layers, tokens, bytes], whether heads are left out, and the bytes of a token it covers."""
        kv_range = chunk.range
        shape = (2, kv_range.num_layers, kv_range.num_tokens, kv_range.num_heads * self._vector_bytes)
        columns = slice(kv_range.head_start * self._vector_bytes, kv_range.head_end * self._vector_bytes)
        view = np.frombuffer(chunk.payload, dtype=np.uint8).reshape(shape)
        return view, kv_range.num_heads < self._num_heads, columns

    def _split(self, block_table: Sequence[int], tokens: tuple[int, int], partial: bool) -> tuple[int, _Ids, _Ids]:
        """How many tokens, from the first, fill whole blocks; those blocks; the slots of the tokens after them.

        With ``partial``, heads are left out, so that no block is whole.
        """
        size = self.block_size
        first, last = tokens[0] // size, tokens[1] // size
        if partial or tokens[0] % size:
            last = first
        whole = max(0, last - first) * size
        blocks = np.asarray(block_table[first : -(-tokens[1] // size)], dtype=np.int64)
        positions = np.arange(tokens[0] + whole, tokens[1], dtype=np.int64)
        slots = blocks[positions // size - first] * size + positions % size
        return whole, blocks[: whole // size], slots


class DeviceTensors(PagedTensors):
    """On a device: gathered and scattered there, on CUDA in a stream of their own."""

    def __init__(self, k: torch.Tensor, v: torch.Tensor) -> None:
        super().__init__(k, v)
        self._stream = torch.cuda.Stream(k.device) if k.device.type == "cuda" else None

    def _copy_out(self, block_table: Sequence[int], chunk: Chunk, after: DeviceEvent | None) -> None:
        heads = slice(*chunk.range.heads)
        with self._in_stream():
            if self._stream is not None and after is not None:
                self._stream.wait_event(after)
            slots, shape = self._slots_and_shape(block_table, chunk)
            gathered = torch.empty(shape, dtype=self.k.dtype, device=self.k.device)
            for i, layer in enumerate(chunk.range.layers):
                for half, flat in enumerate(self.layer(layer)):
                    torch.index_select(flat[:, heads], 0, slots, out=gathered[half, i])
            # Through a byte view, because numpy has no bfloat16.
            memoryview(chunk.payload)[:] = gathered.view(torch.uint8).cpu().numpy().reshape(-1).data

    def _copy_in(self, block_table: Sequence[int], targets: LayerTargets, chunk: Chunk) -> None:
        heads = slice(*chunk.range.heads)
        with self._in_stream():
            slots, shape = self._slots_and_shape(block_table, chunk)
            # The copy avoids torch's warning about read-only buffers.
            data = torch.frombuffer(bytearray(chunk.payload), dtype=self.k.dtype).view(shape).to(self.k.device)
            for i, layer in enumerate(chunk.range.layers):
                for target in targets[layer]:
                    for half, flat in enumerate(self.layer(target)):
                        flat[:, heads].index_copy_(0, slots, data[half, i])
        if self._stream is not None:
            self._stream.synchronize()

    def _slots_and_shape(self, block_table: Sequence[int], chunk: Chunk) -> tuple[torch.Tensor, tuple[int, ...]]:
        kv_range = chunk.range
        slots = slots_of(block_table, *kv_range.tokens, self.block_size, self.k.device)
        return slots, (2, kv_range.num_layers, kv_range.num_tokens, kv_range.num_heads, self.k.shape[-1])

    def _in_stream(self) -> AbstractContextManager[object]:
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

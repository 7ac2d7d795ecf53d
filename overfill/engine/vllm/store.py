"""vLLM's KV cache as a ``KvStore``: the sender reads from its blocks, and the receiver writes into them."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, Protocol, TypeAlias

import numpy as np
import torch

from overfill.engine.vllm.layout import BlockLayout
from overfill.kv.chunks import Chunk, digest, is_damaged
from overfill.kv.store import DeviceEvent, LayerTargets
from overfill.v1 import common_pb2

_Ids: TypeAlias = "np.ndarray[Any, np.dtype[np.int64]]"
_Array: TypeAlias = "np.ndarray[Any, Any]"
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
"""Integer types by width: numpy has no bfloat16, and a copy needs no arithmetic."""


class VllmKvStore:
    """Blocks of a vLLM engine. Implements ``KvStore``.

    Args:
        caches: one tensor per layer of the model, in order, whose first axis is blocks.
        layouts: of keys and of values; equal in all layers.
        block_size: tokens per block.
        first_head: the full model's KV head that is the caches' first one. Chunks count the full model's heads.
    """

    codec = common_pb2.KV_CODEC_RAW

    def __init__(
        self,
        caches: Sequence[torch.Tensor],
        layouts: tuple[BlockLayout, BlockLayout],
        block_size: int,
        first_head: int = 0,
    ) -> None:
        self.block_size = block_size
        self._first_head = first_head
        self._num_heads = math.prod(layouts[0].heads.sizes)
        bits = [cache.view(_BITS[cache.element_size()]) for cache in caches]
        self._blocks = blocks_of(bits, layouts, block_size)

    def read(
        self, block_table: Sequence[int], chunks: Sequence[Chunk], after: Mapping[int, DeviceEvent | None]
    ) -> None:
        """Fills the payloads of ``chunks``, and the checksums of those that have a header."""
        table = self._blocks.table(block_table)
        begun = [
            self._blocks.begin_read(table, chunk, self._heads(chunk), after.get(chunk.range.layer_end - 1))
            for chunk in chunks
        ]
        for chunk, complete in zip(chunks, begun, strict=True):
            complete()
            if chunk.header:
                chunk.checksum = digest(chunk.header, chunk.payload)

    def write(self, block_table: Sequence[int], targets: LayerTargets, chunks: Sequence[Chunk]) -> int:
        """Writes chunks up to the first damaged one, and returns how many."""
        table, written = self._blocks.table(block_table), 0
        try:
            for chunk in chunks:
                if is_damaged(chunk):
                    break
                self._blocks.begin_write(table, chunk, self._heads(chunk), targets)
                written += 1
        finally:
            self._blocks.complete_writes()
        return written

    def _heads(self, chunk: Chunk) -> slice:
        """The caches' heads of a chunk.

        Raises:
            IndexError: the caches do not hold all of them.
        """
        start, end = (head - self._first_head for head in chunk.range.heads)
        if not 0 <= start < end <= self._num_heads:
            last = self._first_head + self._num_heads
            raise IndexError(f"{chunk.range} is not within heads {self._first_head}:{last}, which this cache holds")
        return slice(start, end)


class _Blocks(Protocol):
    """The copies of a store, between chunks and the blocks of a sequence."""

    def table(self, block_table: Sequence[int]) -> Any:
        """A sequence's block ids, where the copies need them."""
        ...

    def begin_read(self, table: Any, chunk: Chunk, heads: slice, after: DeviceEvent | None) -> Callable[[], None]:
        """Begins to read ``chunk`` once ``after`` has passed. The returned function fills its payload."""
        ...

    def begin_write(self, table: Any, chunk: Chunk, heads: slice, targets: LayerTargets) -> None: ...

    def complete_writes(self) -> None:
        """Waits until all that the calling thread has begun to write is in place."""
        ...


def blocks_of(caches: Sequence[torch.Tensor], layouts: tuple[BlockLayout, BlockLayout], block_size: int) -> _Blocks:
    """The copies for caches of integers, on the device where they are."""
    on_host = caches[0].device.type == "cpu"
    return (HostBlocks if on_host else DeviceBlocks)(caches, layouts, block_size)


def _payload_shape(chunk: Chunk, head_dim: int) -> tuple[int, ...]:
    kv_range = chunk.range
    return (2, kv_range.num_layers, kv_range.num_tokens, kv_range.num_heads, head_dim)


class HostBlocks:
    """Blocks in host memory, copied with numpy on the calling thread; torch would start a pool for each I/O thread.

    Whole blocks are copied one by one, the tokens before and after them together.
    """

    def __init__(
        self, caches: Sequence[torch.Tensor], layouts: tuple[BlockLayout, BlockLayout], block_size: int
    ) -> None:
        self._block_size = block_size
        self._head_dim = math.prod(layouts[0].dims.sizes)
        self._sizes = [(layout.tokens.sizes, layout.dims.sizes) for layout in layouts]
        # Where a head's dimensions are not side by side, as a CPU's keys, elements move one by one. A head at a time,
        # all of them stay in the cache nearest to the core: 1.5 to 2.7 times as fast as all heads of a block at once.
        self._by_head = [layout.dims.sizes[-1] < self._head_dim or layout.dims.strides[-1] != 1 for layout in layouts]
        self._arrays = [[layout.view(cache).numpy() for cache in caches] for layout in layouts]

    def table(self, block_table: Sequence[int]) -> _Ids:
        return np.asarray(block_table, dtype=np.int64)

    def begin_read(self, table: _Ids, chunk: Chunk, heads: slice, after: DeviceEvent | None) -> Callable[[], None]:
        return partial(self._read, table, chunk, heads)

    def _read(self, table: _Ids, chunk: Chunk, heads: slice) -> None:
        for half, layer, payload, index in self._pieces(table, chunk, heads):
            payload[...] = self._arrays[half][layer][index]

    def begin_write(self, table: _Ids, chunk: Chunk, heads: slice, targets: LayerTargets) -> None:
        for half, layer, payload, index in self._pieces(table, chunk, heads):
            if stored := targets[layer]:
                payload = np.ascontiguousarray(payload)  # of a head alone; else it is
            for cache_layer in stored:
                self._arrays[half][cache_layer][index] = payload

    def complete_writes(self) -> None:
        pass

    def _pieces(self, table: _Ids, chunk: Chunk, heads: slice) -> Iterator[tuple[int, int, _Array, tuple[Any, ...]]]:
        """Yields half, full-model layer, part of the payload and its index in the half's cache for each copy."""
        shape = _payload_shape(chunk, self._head_dim)
        payload = np.frombuffer(chunk.payload, dtype=self._arrays[0][0].dtype).reshape(shape)
        start, end = chunk.range.tokens
        size = self._block_size
        first, last = -(-start // size), end // size
        edges = [(start, first * size), (last * size, end)] if first < last else [(start, end)]
        whole = slice(first * size - start, last * size - start)
        for half, (tokens, dims) in enumerate(self._sizes):
            every = (slice(None),) * len(tokens)
            for layer, rows in zip(chunk.range.layers, payload[half], strict=True):
                if first < last:
                    blocks = rows[whole].reshape(last - first, *tokens, chunk.range.num_heads, *dims)
                    for row, block in zip(blocks, table[first:last], strict=True):
                        if not self._by_head[half]:
                            yield half, layer, row, (block, *every, heads)
                            continue
                        for at, head in enumerate(range(heads.start, heads.stop)):
                            yield half, layer, row[(*every, at)], (block, *every, head)
                for begin, stop in edges:
                    if begin < stop:
                        positions = np.arange(begin, stop)
                        digits = np.unravel_index(positions % size, tokens)
                        row = rows[begin - start : stop - start].reshape(-1, chunk.range.num_heads, *dims)
                        yield half, layer, row, (table[positions // size], *digits, heads)


class DeviceBlocks:
    """Blocks on a device, gathered and scattered there, on CUDA in a stream per thread beside the engine's.

    A call uploads its block table once. A chunk is one gather per layer of keys and values together, where the backend
    keeps them alike, and one copy to or from pinned memory, which torch's allocator reuses. While the device copies a
    chunk, the thread reads or checks the one before. All waits release the interpreter's lock and leave the core.
    """

    def __init__(
        self, caches: Sequence[torch.Tensor], layouts: tuple[BlockLayout, BlockLayout], block_size: int
    ) -> None:
        self._block_size = block_size
        self._device = caches[0].device
        self._dtype = caches[0].dtype
        self._on_cuda = self._device.type == "cuda"
        self._head_dim = math.prod(layouts[0].dims.sizes)
        self._local = threading.local()
        keys, values = layouts
        if (keys.tokens, keys.heads, keys.dims) == (values.tokens, values.heads, values.dims):
            groups = [(slice(0, 2), keys, values.offset - keys.offset)]
        else:
            groups = [(slice(0, 1), keys, 0), (slice(1, 2), values, 0)]
        # Of each group: its halves, the sizes of tokens and of dimensions, and a view per layer, [halves, num_blocks,
        # *tokens, kv_heads, *head_dim].
        self._groups = [
            (halves, layout.tokens.sizes, layout.dims.sizes, [_with_halves(layout, c, halves, step) for c in caches])
            for halves, layout, step in groups
        ]

    def table(self, block_table: Sequence[int]) -> torch.Tensor:
        with self._in_stream():
            return self._uploaded(np.asarray(block_table, dtype=np.int64), torch.int64)

    def begin_read(
        self, table: torch.Tensor, chunk: Chunk, heads: slice, after: DeviceEvent | None
    ) -> Callable[[], None]:
        with self._in_stream():
            if self._on_cuda and after is not None:
                torch.cuda.current_stream(self._device).wait_event(after)
            index = self._index(table, chunk)
            shape = (chunk.range.num_tokens, chunk.range.num_heads, self._head_dim)
            layers = []
            for layer in chunk.range.layers:
                halves = [
                    views[layer][(slice(None), *at, heads)].reshape(-1, *shape)
                    for (_, _, _, views), at in zip(self._groups, index, strict=True)
                ]
                layers.append(halves[0] if len(halves) == 1 else torch.cat(halves))
            gathered = layers[0] if len(layers) == 1 else torch.stack(layers, dim=1)
            arrived = torch.empty(gathered.shape, dtype=self._dtype, pin_memory=self._on_cuda)
            arrived.copy_(gathered, non_blocking=True)
            done = self._mark()

        def fill() -> None:
            if done is not None:
                done.synchronize()
            payload = np.frombuffer(chunk.payload, dtype=np.uint8)
            np.copyto(payload, arrived.view(torch.uint8).numpy().reshape(-1))

        return fill

    def begin_write(self, table: torch.Tensor, chunk: Chunk, heads: slice, targets: LayerTargets) -> None:
        with self._in_stream():
            payload = self._uploaded(np.frombuffer(chunk.payload, dtype=np.uint8), torch.uint8)
            data = payload.view(self._dtype).view(_payload_shape(chunk, self._head_dim))
            index = self._index(table, chunk)
            for (halves, _, dims, views), at in zip(self._groups, index, strict=True):
                for i, layer in enumerate(chunk.range.layers):
                    source = data[halves, i].unflatten(-1, dims)
                    for cache_layer in targets[layer]:
                        views[cache_layer][(slice(None), *at, heads)] = source

    def complete_writes(self) -> None:
        with self._in_stream():
            done = self._mark()
        if done is not None:
            done.synchronize()

    def _index(self, table: torch.Tensor, chunk: Chunk) -> list[tuple[Any, ...]]:
        """Of each group, the block and the slot of each of the chunk's tokens, the slot split as the layout does."""
        positions = torch.arange(*chunk.range.tokens, device=self._device)
        blocks, slots = table[positions // self._block_size], positions % self._block_size
        return [(blocks, *torch.unravel_index(slots, tokens)) for _, tokens, _, _ in self._groups]

    def _uploaded(self, array: _Array, dtype: torch.dtype) -> torch.Tensor:
        staged = torch.empty(array.shape, dtype=dtype, pin_memory=self._on_cuda)
        np.copyto(staged.numpy(), array)
        return staged.to(self._device, non_blocking=True)

    def _in_stream(self) -> AbstractContextManager[object]:
        """Makes this thread's stream the current one."""
        if not self._on_cuda:
            return nullcontext()
        if not hasattr(self._local, "stream"):
            self._local.stream = torch.cuda.Stream(self._device)
        return torch.cuda.stream(self._local.stream)

    def _mark(self) -> torch.cuda.Event | None:
        """The end of the work that this thread has given to the device; None on a CPU, where it is done."""
        if not self._on_cuda:
            return None
        event = torch.cuda.Event(blocking=True)  # the waiting thread sleeps
        event.record()
        return event


def _with_halves(layout: BlockLayout, cache: torch.Tensor, halves: slice, step: int) -> torch.Tensor:
    """View of a layer's ``cache`` with a first axis for ``halves``, which lie ``step`` elements apart."""
    view = layout.view(cache)
    return view.as_strided([halves.stop - halves.start, *view.shape], [step, *view.stride()], view.storage_offset())

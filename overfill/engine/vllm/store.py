"""vLLM's KV cache as a ``KvStore``: the sender reads from its blocks, and the receiver writes into them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeAlias

import numpy as np
import torch

from overfill.engine.vllm.layout import BlockLayout
from overfill.kv.chunks import Chunk, digest, num_undamaged
from overfill.kv.store import DeviceEvent, LayerTargets
from overfill.v1 import common_pb2

_Ids: TypeAlias = "np.ndarray[Any, np.dtype[np.int64]]"
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
        self._head_dim = math.prod(layouts[0].dims.sizes)
        self._sizes = [(layout.tokens.sizes, layout.dims.sizes) for layout in layouts]
        self._views = [[layout.view(cache).view(_BITS[cache.element_size()]) for cache in caches] for layout in layouts]
        self._device = caches[0].device
        self._on_host = self._device.type == "cpu"
        self._stream = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None
        # Numpy copies on the calling thread alone; torch would start its pool for each of the I/O threads.
        self._arrays = [[view.numpy() for view in views] for views in self._views] if self._on_host else []

    def read(
        self, block_table: Sequence[int], chunks: Sequence[Chunk], after: Mapping[int, DeviceEvent | None]
    ) -> None:
        """Fills the payloads of ``chunks``, and the checksums of those that have a header."""
        for chunk in chunks:
            spans = self._spans(block_table, chunk)
            if self._on_host:
                self._read_host(chunk, spans)
            else:
                self._read_device(chunk, spans, after.get(chunk.range.layer_end - 1))
            if chunk.header:
                chunk.checksum = digest(chunk.header, chunk.payload)

    def write(self, block_table: Sequence[int], targets: LayerTargets, chunks: Sequence[Chunk]) -> int:
        """Writes chunks up to the first damaged one, and returns how many."""
        undamaged = num_undamaged(chunks)
        for chunk in chunks[:undamaged]:
            spans = self._spans(block_table, chunk)
            if self._on_host:
                self._write_host(chunk, spans, targets)
            else:
                self._write_device(chunk, spans, targets)
        return undamaged

    def _spans(self, block_table: Sequence[int], chunk: Chunk) -> list[_Span]:
        """The chunk's tokens as whole blocks, and as single tokens before and after them."""
        start, end = chunk.range.tokens
        size = self.block_size
        first, last = -(-start // size), end // size
        if first >= last:  # no whole block
            return [_Span.of_tokens(block_table, start, end, start, size)]
        spans = [_Span.of_blocks(block_table, first, last, start, size)]
        if start < first * size:
            spans.append(_Span.of_tokens(block_table, start, first * size, start, size))
        if last * size < end:
            spans.append(_Span.of_tokens(block_table, last * size, end, start, size))
        return spans

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

    def _payload_shape(self, chunk: Chunk) -> tuple[int, ...]:
        kv_range = chunk.range
        return (2, kv_range.num_layers, kv_range.num_tokens, kv_range.num_heads, self._head_dim)

    def _shape(self, half: int, span: _Span, num_heads: int) -> tuple[int, ...]:
        """Shape of a span's elements in the cache's order of axes."""
        tokens, dims = self._sizes[half]
        return (len(span.blocks), *(() if span.slots is not None else tokens), num_heads, *dims)

    def _index(self, half: int, span: _Span, heads: slice) -> tuple[Any, ...]:
        """Index of a span with single tokens in a view."""
        assert span.slots is not None
        tokens, _ = self._sizes[half]
        return (span.blocks, *np.unravel_index(span.slots, tokens), heads)

    def _read_host(self, chunk: Chunk, spans: Sequence[_Span]) -> None:
        heads = self._heads(chunk)
        payload = np.frombuffer(chunk.payload, dtype=self._arrays[0][0].dtype).reshape(self._payload_shape(chunk))
        for half, (i, layer), span in itertools.product((0, 1), enumerate(chunk.range.layers), spans):
            view = self._arrays[half][layer]
            target = payload[half, i, span.place].reshape(self._shape(half, span, chunk.range.num_heads))
            if span.slots is not None:
                target[:] = view[self._index(half, span, heads)]
                continue
            picked = (slice(None),) * len(self._sizes[half][0]) + (heads,)
            for row, block in zip(target, span.blocks, strict=True):
                row[:] = view[block][picked]

    def _write_host(self, chunk: Chunk, spans: Sequence[_Span], targets: LayerTargets) -> None:
        heads = self._heads(chunk)
        payload = np.frombuffer(chunk.payload, dtype=self._arrays[0][0].dtype).reshape(self._payload_shape(chunk))
        for half, (i, layer), span in itertools.product((0, 1), enumerate(chunk.range.layers), spans):
            source = payload[half, i, span.place].reshape(self._shape(half, span, chunk.range.num_heads))
            picked = (slice(None),) * len(self._sizes[half][0]) + (heads,)
            for cache_layer in targets[layer]:
                view = self._arrays[half][cache_layer]
                if span.slots is not None:
                    view[self._index(half, span, heads)] = source
                    continue
                for row, block in zip(source, span.blocks, strict=True):
                    view[block][picked] = row

    def _read_device(self, chunk: Chunk, spans: Sequence[_Span], after: DeviceEvent | None) -> None:
        heads, shape = self._heads(chunk), self._payload_shape(chunk)
        with self._in_stream():
            if self._stream is not None and after is not None:
                self._stream.wait_event(after)
            gathered = torch.empty(shape, dtype=self._views[0][0].dtype, device=self._device)
            for half, (i, layer), span in itertools.product((0, 1), enumerate(chunk.range.layers), spans):
                picked = self._views[half][layer][self._device_index(half, span, heads)]
                gathered[half, i, span.place] = picked.reshape(gathered[half, i, span.place].shape)
            memoryview(chunk.payload)[:] = gathered.view(torch.uint8).cpu().numpy().reshape(-1).data

    def _write_device(self, chunk: Chunk, spans: Sequence[_Span], targets: LayerTargets) -> None:
        heads, shape = self._heads(chunk), self._payload_shape(chunk)
        with self._in_stream():
            # The copy avoids torch's warning about read-only buffers.
            data = torch.frombuffer(bytearray(chunk.payload), dtype=self._views[0][0].dtype).view(shape)
            data = data.to(self._device)
            for half, (i, layer), span in itertools.product((0, 1), enumerate(chunk.range.layers), spans):
                source = data[half, i, span.place].reshape(self._shape(half, span, chunk.range.num_heads))
                for cache_layer in targets[layer]:
                    self._views[half][cache_layer][self._device_index(half, span, heads)] = source
        if self._stream is not None:
            self._stream.synchronize()

    def _device_index(self, half: int, span: _Span, heads: slice) -> tuple[Any, ...]:
        if span.slots is None:
            index: tuple[Any, ...] = (span.blocks, *(slice(None),) * len(self._sizes[half][0]), heads)
        else:
            index = self._index(half, span, heads)
        return tuple(torch.from_numpy(one).to(self._device) if isinstance(one, np.ndarray) else one for one in index)

    def _in_stream(self) -> AbstractContextManager[object]:
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)


class _Span:
    """Tokens of a chunk that are copied alike.

    Attributes:
        place: where they are among the chunk's tokens.
        blocks: the block of each whole block, or of each single token.
        slots: each single token's slot in its block; None for whole blocks.
    """

    __slots__ = ("blocks", "place", "slots")

    def __init__(self, place: slice, blocks: _Ids, slots: _Ids | None) -> None:
        self.place = place
        self.blocks = blocks
        self.slots = slots

    @classmethod
    def of_blocks(cls, table: Sequence[int], first: int, last: int, start: int, size: int) -> _Span:
        blocks = np.asarray(table[first:last], dtype=np.int64)
        return cls(slice(first * size - start, last * size - start), blocks, None)

    @classmethod
    def of_tokens(cls, table: Sequence[int], begin: int, end: int, start: int, size: int) -> _Span:
        positions = np.arange(begin, end, dtype=np.int64)
        blocks = np.asarray(table[begin // size : -(-end // size)], dtype=np.int64)
        return cls(slice(begin - start, end - start), blocks[positions // size - begin // size], positions % size)

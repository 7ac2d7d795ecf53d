"""The paged KV cache: keys and values of all blocks, addressed by slot.

Token ``t`` of a sequence with block table ``table`` is in slot
``table[t // block_size] * block_size + t % block_size``.

An int8 cache holds codes, and a float32 scale for each key and each value vector: half of bfloat16's bytes. The codes
are those of the int8 codec (``kv.codecs``). Chunks in that codec are stored unchanged. All other KV is rounded when it
is written, by half a step at most: 1/254 of the vector's largest magnitude.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from overfill.kv.chunks import Buffer, Chunk, digest, num_undamaged
from overfill.kv.codecs import decode, encode, quantise
from overfill.kv.native import library
from overfill.kv.spec import SCALE_BYTES, KvCacheDtype, KvSpec
from overfill.kv.store import DeviceEvent, LayerTargets
from overfill.kv.tensors import (
    TORCH_DTYPES,
    DeviceTensors,
    NumpyTensors,
    PagedTensors,
    slots_of,
    zeros,
)
from overfill.v1 import common_pb2


class KvCache:
    """Keys and values of all blocks.

    ``read`` and ``write`` may be called from any thread, beside a running step.

    Args:
        dtype: how elements are stored; "auto" is ``spec.dtype``.

    Attributes:
        spec: geometry and dtype of the KV that is put in and taken out, however it is stored.
        codec: chunks in this codec are stored unchanged.
        k, v: [num_layers, num_blocks, block_size, num_kv_heads, head_dim]: elements, or int8 codes. Keys are post-RoPE.
        k_scales, v_scales: [num_layers, num_blocks, block_size, num_kv_heads, 1] float32, factors of the codes. None
            means that ``k`` and ``v`` are elements.
    """

    def __init__(
        self, spec: KvSpec, num_blocks: int, block_size: int, device: torch.device, dtype: KvCacheDtype = "auto"
    ) -> None:
        self.spec = spec
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.device = device
        self.codec = common_pb2.KV_CODEC_INT8 if dtype == "int8" else common_pb2.KV_CODEC_RAW
        self._elements = self._new_tensors(torch.int8 if dtype == "int8" else TORCH_DTYPES[spec.dtype], spec.head_dim)
        self._scales = self._new_tensors(torch.float32, 1) if dtype == "int8" else None
        self.k, self.v = self._elements.k, self._elements.v
        self.k_scales = None if self._scales is None else self._scales.k
        self.v_scales = None if self._scales is None else self._scales.v

    @property
    def lossless(self) -> bool:
        """Whether ``gather`` returns exactly what was put."""
        return self._scales is None

    @property
    def token_bytes(self) -> int:
        """Bytes that store one token's keys and values in all layers."""
        if self._scales is None:
            return self.spec.token_bytes
        return 2 * self.spec.num_layers * self.spec.num_kv_heads * (self.spec.head_dim + SCALE_BYTES)

    @property
    def gathered_layer_bytes(self) -> int:
        """Bytes that ``gather`` allocates per token, temporaries included."""
        if self._scales is None:
            return self.spec.token_layer_bytes
        # Temporaries are of keys or of values: codes, scales and, on a CPU, two float32 per element for the product.
        return self.spec.token_layer_bytes + self.spec.num_kv_heads * (self.spec.head_dim * (1 + 2 * 4) + SCALE_BYTES)

    @property
    def block_bytes(self) -> int:
        """Bytes that store one block."""
        return self.token_bytes * self.block_size

    def slots(self, block_table: Sequence[int], start: int, end: int) -> torch.Tensor:
        """Slots of tokens ``start..end`` of a sequence. [end - start], int64, on the cache's device."""
        return slots_of(block_table, start, end, self.block_size, self.device)

    def layer(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Views of one layer's ``k`` and ``v``, each [num_slots, num_kv_heads, head_dim]."""
        return self._elements.layer(index)

    def put(self, layer: int, slots: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        """Writes new tokens' keys and values, each [len(slots), num_kv_heads, head_dim], in the current stream."""
        if self._scales is None:
            for flat, new in zip(self.layer(layer), (k, v), strict=True):
                flat.index_copy_(0, slots, new)
            return
        for codes, scales, new in zip(self.layer(layer), self._scales.layer(layer), (k, v), strict=True):
            new_scales, new_codes = quantise(new)
            codes.index_copy_(0, slots, new_codes)
            scales.index_copy_(0, slots, new_scales)

    def gather(
        self, layer: int, slots: torch.Tensor, out: tuple[torch.Tensor, torch.Tensor] | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of ``slots`` in one layer, each [len(slots), num_kv_heads, head_dim] of ``spec.dtype``.

        Args:
            out: the two tensors that are filled and returned; None allocates them.
        """
        if self._scales is None:
            k, v = self.layer(layer)
            k_out, v_out = out or (None, None)
            return torch.index_select(k, 0, slots, out=k_out), torch.index_select(v, 0, slots, out=v_out)
        out = out or (self.new_scratch(len(slots)), self.new_scratch(len(slots)))
        for codes, scales, half in zip(self.layer(layer), self._scales.layer(layer), out, strict=True):
            torch.mul(codes.index_select(0, slots), scales.index_select(0, slots), out=half)
        return out

    def new_scratch(self, count: int) -> torch.Tensor:
        """Uninitialised memory for the keys or the values that ``gather`` returns for ``count`` slots."""
        shape = (count, self.spec.num_kv_heads, self.spec.head_dim)
        return torch.empty(shape, dtype=TORCH_DTYPES[self.spec.dtype], device=self.device)

    def read(
        self, block_table: Sequence[int], chunks: Sequence[Chunk], after: Mapping[int, DeviceEvent | None]
    ) -> None:
        """Fills ``chunks`` with keys and values of ``spec.dtype``; as ``PagedTensors.read``.

        A chunk that has room for scales gets them, and codes, unchanged.
        """
        if self._scales is None:
            self._elements.read(block_table, chunks, after)
            return
        for chunk in chunks:
            if chunk.scales:
                self._elements.read(block_table, [Chunk(chunk.range, chunk.payload)], after)
                self._scales.read(block_table, [Chunk(chunk.range, chunk.scales)], after)
                continue
            num_vectors = chunk.range.num_vectors
            codes = Chunk(chunk.range, bytearray(num_vectors * self.spec.head_dim))
            scales = Chunk(chunk.range, bytearray(num_vectors * SCALE_BYTES))
            self._elements.read(block_table, [codes], after)
            self._scales.read(block_table, [scales], after)
            vectors = decode(self.spec.dtype, self.spec.head_dim, scales.payload, codes.payload)
            memoryview(chunk.payload)[:] = vectors
            if chunk.header:
                chunk.checksum = digest(chunk.header, chunk.payload)

    def write(self, block_table: Sequence[int], targets: LayerTargets, chunks: Sequence[Chunk]) -> int:
        """Writes ``chunks``, which are raw or in this cache's codec; as ``PagedTensors.write``."""
        if self._scales is None:
            return self._elements.write(block_table, targets, chunks)
        undamaged = num_undamaged(chunks)
        for chunk in chunks[:undamaged]:
            scales, codes = (chunk.scales, chunk.payload) if chunk.scales else self._encode(chunk.payload)
            self._scales.write(block_table, targets, [Chunk(chunk.range, scales)])
            self._elements.write(block_table, targets, [Chunk(chunk.range, codes)])
        return undamaged

    def _encode(self, payload: Buffer) -> tuple[Buffer, Buffer]:
        """Scales and codes of a raw payload."""
        # The copy avoids torch's warning about read-only buffers.
        return encode(self.spec.dtype, self.spec.head_dim, memoryview(bytearray(payload)))

    def _new_tensors(self, dtype: torch.dtype, width: int) -> PagedTensors:
        shape = (self.spec.num_layers, self.num_blocks, self.block_size, self.spec.num_kv_heads, width)
        k, v = (zeros(shape, dtype, self.device) for _ in range(2))
        if self.device.type != "cpu":
            return DeviceTensors(k, v)
        native = library.load()
        return NumpyTensors(k, v) if native is None else library.NativeTensors(native, k, v)


def copy_sequence(
    source: KvCache,
    source_blocks: Sequence[int],
    target: KvCache,
    target_blocks: Sequence[int],
    layer_map: Sequence[int],
    num_tokens: int,
    start: int = 0,
) -> None:
    """Copies tokens ``start..num_tokens`` of a sequence between caches of one process, in the current stream.

    ``layer_map[i]`` is the source layer that is copied to layer i of ``target``.
    """
    source_slots = source.slots(source_blocks, start, num_tokens)
    target_slots = target.slots(target_blocks, start, num_tokens)
    for target_layer, source_layer in enumerate(layer_map):
        target.put(target_layer, target_slots, *source.gather(source_layer, source_slots))

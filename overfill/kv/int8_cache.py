"""A KV cache of int8 codes, with a scale for each key and each value vector: half of bfloat16's bytes.

The codes are those of the int8 codec (``kv.codecs``): what travelled in it is stored as it came, everything else is
rounded when it is written, by half a step at most, 1/254 of the vector's largest magnitude.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from overfill.kv.cache import KvCache
from overfill.kv.cells import Cells, DeviceEvent
from overfill.kv.codecs import decode, encode, quantise
from overfill.kv.native.library import Rows
from overfill.kv.pieces import Piece, digest, first_damaged
from overfill.kv.spec import SCALE_BYTES, KvCacheDtype, KvSpec
from overfill.kv.wire import Buffer
from overfill.v1 import common_pb2

_INT8 = common_pb2.KV_CODEC_INT8


class Int8KvCache(KvCache):
    """As ``KvCache``, but ``k`` and ``v`` are codes.

    Attributes:
        k_scales, v_scales: [num_layers, num_blocks, block_size, num_kv_heads, 1], float32; times the codes they are
            keys and values.
    """

    def __init__(self, spec: KvSpec, num_blocks: int, block_size: int, device: torch.device) -> None:
        super().__init__(spec, num_blocks, block_size, device)
        self.k_scales, self.v_scales = (self._zeros(torch.float32, 1) for _ in range(2))
        self._scales = Cells(self.k_scales, self.v_scales)

    codec = _INT8

    @property
    def held_as(self) -> torch.dtype:
        return torch.int8

    @property
    def token_bytes(self) -> int:
        return 2 * self.spec.num_layers * self.spec.num_kv_heads * (self.spec.head_dim + SCALE_BYTES)

    @property
    def gathered_layer_bytes(self) -> int:
        # Of one half at a time: codes and scales and, on a CPU, two float32 of each element while they are multiplied.
        return self.spec.token_layer_bytes + self.spec.num_kv_heads * (self.spec.head_dim * (1 + 2 * 4) + SCALE_BYTES)

    def put(self, layer: int, slots: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        for codes, scales, new in zip(self.layer(layer), self._scales.layer(layer), (k, v), strict=True):
            new_scales, new_codes = quantise(new, _INT8)
            codes.index_copy_(0, slots, new_codes)
            scales.index_copy_(0, slots, new_scales)

    def gather(
        self, layer: int, slots: torch.Tensor, room: tuple[torch.Tensor, torch.Tensor] | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if room is None:
            room = self.new_room(len(slots)), self.new_room(len(slots))
        for codes, scales, out in zip(self.layer(layer), self._scales.layer(layer), room, strict=True):
            torch.mul(codes.index_select(0, slots), scales.index_select(0, slots), out=out)
        return room

    def read(
        self,
        block_table: Sequence[int],
        layers: Sequence[int],
        tokens: tuple[int, int],
        heads: tuple[int, int],
        after: DeviceEvent | None = None,
        out: memoryview | None = None,
    ) -> memoryview:
        scales = self._scales.read(block_table, layers, tokens, heads, after)
        codes = self._cells.read(block_table, layers, tokens, heads, after)
        data = memoryview(decode(_INT8, self.spec.dtype, self.spec.head_dim, scales, codes))
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
        scales, codes = self._coded(payload)
        self._scales.write(block_table, rows, tokens, heads, scales)
        self._cells.write(block_table, rows, tokens, heads, codes)

    def read_pieces(
        self, block_table: Sequence[int], pieces: Sequence[Piece], after: Mapping[int, DeviceEvent | None]
    ) -> None:
        for piece in pieces:
            box, out = piece.box, memoryview(piece.payload)
            self.read(block_table, box.layers, box.tokens, box.heads, after.get(box.layers[-1]), out)
            if piece.header:
                piece.checksum = digest(piece.header, piece.payload)

    def write_pieces(self, block_table: Sequence[int], rows: Rows, pieces: Sequence[Piece]) -> int:
        whole = first_damaged(pieces)
        for piece in pieces[:whole]:
            scales, codes = (piece.scales, piece.payload) if piece.scales else self._coded(piece.payload)
            self._scales.write_pieces(block_table, rows, [Piece(piece.box, scales)])
            self._cells.write_pieces(block_table, rows, [Piece(piece.box, codes)])
        return whole

    def _coded(self, payload: Buffer) -> tuple[Buffer, Buffer]:
        """Scales and codes of a raw payload."""
        # A copy: torch refuses to look at a read-only buffer without a warning.
        return encode(_INT8, self.spec.dtype, self.spec.head_dim, memoryview(bytearray(payload)))


def new_cache(
    spec: KvSpec, num_blocks: int, block_size: int, device: torch.device, dtype: KvCacheDtype = "auto"
) -> KvCache:
    """A cache of ``spec``, held as ``dtype`` says."""
    kind = Int8KvCache if dtype == "int8" else KvCache
    return kind(spec, num_blocks, block_size, device)

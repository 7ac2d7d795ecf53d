"""One KV chunk: sealed by the sender, checked by the receiver. Bytes only; no sockets, no tensors."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

from overfill.errors import TransferFailed
from overfill.kv.pieces import Piece, digest, is_damaged
from overfill.kv.ranges import KvRange
from overfill.kv.spec import DTYPE_BYTES, DTYPE_TO_PROTO, SCALE_BYTES, KvSpec
from overfill.kv.wire import Blank, Buffer, Frame, WireChunk, frame, lay_out
from overfill.rpc.constants import MAX_CHUNK_PAYLOAD, MAX_SHARED_PAYLOAD
from overfill.v1 import common_pb2, kv_pb2

TRANSFER_ID_BYTES = 16

# transfer_id, attempt, the six numbers of the range, dtype, codec, length of scales, length of payload.
_HEADER = struct.Struct("<16sI6I2I2I")


@dataclass(frozen=True, slots=True)
class TransferSpec:
    """What both ends know about a transfer before its first chunk."""

    transfer_id: bytes
    attempt: int
    kv: KvSpec
    layers: tuple[int, ...]
    tokens: tuple[int, int]
    codec: common_pb2.KvCodec = common_pb2.KV_CODEC_RAW

    @property
    def total_bytes(self) -> int:
        """What the whole transfer takes in a cache."""
        return len(self.layers) * (self.tokens[1] - self.tokens[0]) * self.kv.token_layer_bytes

    def cache_bytes(self, box: KvRange) -> int:
        """What ``box`` takes in a cache."""
        return 2 * box.cells * self.kv.head_dim * DTYPE_BYTES[self.kv.dtype]

    def payload_bytes(self, box: KvRange) -> int:
        """Length of a payload that covers ``box``."""
        if self.codec == common_pb2.KV_CODEC_RAW:
            return self.cache_bytes(box)
        return 2 * box.cells * self.kv.head_dim

    def scales_bytes(self, box: KvRange) -> int:
        """Length of the scales that go with it."""
        return 0 if self.codec == common_pb2.KV_CODEC_RAW else 2 * box.cells * SCALE_BYTES


def checksum(head: kv_pb2.KvChunk, scales: Buffer, payload: Buffer) -> int:
    """XXH3-64 over the header struct, the scales and the payload (see ``KvChunk.checksum``)."""
    return digest(_header(head, scales, payload), scales, payload)


def _header(head: kv_pb2.KvChunk, scales: Buffer, payload: Buffer) -> bytes:
    return _HEADER.pack(
        head.transfer_id,
        head.attempt,
        *KvRange.from_proto(head.range).as_tuple(),
        head.dtype,
        head.codec,
        len(scales),
        len(payload),
    )


def seal(
    spec: TransferSpec,
    box: KvRange,
    payload: Buffer,
    scales: Buffer = b"",
    slot: int | None = None,
    known: int | None = None,
) -> Frame:
    """A chunk with its checksum, for ``wire.join``; with ``slot``, its payload stays where it is, in that slot.

    Args:
        known: the checksum, where it was computed before.
    """
    head = _head(spec, box)
    if slot is not None:
        head.shared.slot, head.shared.length = slot, len(payload)
    known = checksum(head, scales, payload) if known is None else known
    return frame(head, scales, b"" if slot is not None else payload, known)


def blank_piece(spec: TransferSpec, box: KvRange, payload: memoryview) -> Piece:
    """What a chunk that is not encoded is read into, where its payload is to be."""
    return Piece(box, payload, _header(_head(spec, box), b"", payload))


def lay_out_raw(spec: TransferSpec, boxes: Sequence[KvRange]) -> tuple[bytes, list[Blank]]:
    """A message of chunks that are not encoded: their payloads are to be written, then sealed in place."""
    return lay_out([(_head(spec, box), spec.cache_bytes(box)) for box in boxes])


def seal_in_place(blank: Blank, known: int | None = None) -> None:
    """Writes the checksum of a chunk whose payload has been written; ``known`` where it was computed before."""
    known = checksum(blank.head, b"", blank.payload) if known is None else known
    blank.checksum[:] = known.to_bytes(8, "little")


def _head(spec: TransferSpec, box: KvRange) -> kv_pb2.KvChunk:
    return kv_pb2.KvChunk(
        transfer_id=spec.transfer_id,
        attempt=spec.attempt,
        range=box.to_proto(),
        dtype=DTYPE_TO_PROTO[spec.kv.dtype],
        codec=spec.codec,
    )


def check(spec: TransferSpec, chunk: WireChunk) -> KvRange:
    """The range of a chunk that is right in every respect but its place in the transfer (``Coverage`` knows that).

    Raises:
        TransferFailed: naming what is wrong: transfer, attempt, dtype, codec, length or checksum.
    """
    piece = check_head(spec, chunk)
    if is_damaged(piece):
        raise wrong_checksum(piece.box)
    return piece.box


def wrong_checksum(box: KvRange) -> TransferFailed:
    """What to raise for a chunk that is damaged."""
    return TransferFailed(f"chunk of {box} has a wrong checksum")


def check_head(spec: TransferSpec, chunk: WireChunk) -> Piece:
    """As ``check``, but for the checksum, which is yet to be held against the payload."""
    head = chunk.head
    box = KvRange.from_proto(head.range)
    if head.transfer_id != spec.transfer_id:
        raise TransferFailed("chunk belongs to another transfer")
    if head.attempt != spec.attempt:
        raise TransferFailed(f"chunk belongs to attempt {head.attempt}, this is attempt {spec.attempt}")
    if head.dtype != DTYPE_TO_PROTO[spec.kv.dtype]:
        raise TransferFailed(f"chunk of {box} has dtype {head.dtype}, expected {spec.kv.dtype}")
    if head.codec != spec.codec:
        raise TransferFailed(f"chunk of {box} has codec {head.codec}, expected {spec.codec}")
    most = MAX_SHARED_PAYLOAD if head.HasField("shared") else MAX_CHUNK_PAYLOAD
    if len(chunk.payload) > most:
        raise TransferFailed(f"chunk of {box} has {len(chunk.payload)} bytes, the limit is {most}")
    expected = spec.payload_bytes(box)
    if len(chunk.payload) != expected:
        raise TransferFailed(f"chunk of {box} has {len(chunk.payload)} bytes, its shape needs {expected}")
    if len(chunk.scales) != spec.scales_bytes(box):
        raise TransferFailed(f"chunk of {box} has {len(chunk.scales)} bytes of scales, not {spec.scales_bytes(box)}")
    return Piece(box, chunk.payload, _header(head, chunk.scales, chunk.payload), head.checksum, chunk.scales)

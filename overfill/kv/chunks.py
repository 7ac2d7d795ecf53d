"""One KV chunk: sealed by the sender, checked by the receiver. Bytes only; no sockets, no tensors."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

import xxhash

from overfill.errors import TransferFailed
from overfill.kv.ranges import KvRange
from overfill.kv.spec import DTYPE_BYTES, DTYPE_TO_PROTO, SCALE_BYTES, KvSpec
from overfill.kv.wire import Blank, Buffer, Frame, WireChunk, frame, lay_out
from overfill.rpc.constants import MAX_CHUNK_PAYLOAD
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
    header = _HEADER.pack(
        head.transfer_id,
        head.attempt,
        *KvRange.from_proto(head.range).as_tuple(),
        head.dtype,
        head.codec,
        len(scales),
        len(payload),
    )
    digest = xxhash.xxh3_64(header)
    digest.update(scales)
    digest.update(payload)
    return digest.intdigest()


def seal(spec: TransferSpec, box: KvRange, payload: Buffer, scales: Buffer = b"", slot: int | None = None) -> Frame:
    """A chunk with its checksum, for ``wire.join``; with ``slot``, its payload stays where it is, in that slot."""
    head = _head(spec, box)
    if slot is not None:
        head.shared.slot, head.shared.length = slot, len(payload)
    return frame(head, scales, b"" if slot is not None else payload, checksum(head, scales, payload))


def lay_out_raw(spec: TransferSpec, boxes: Sequence[KvRange]) -> tuple[bytes, list[Blank]]:
    """A message of chunks that are not encoded: their payloads are to be written, then sealed in place."""
    return lay_out([(_head(spec, box), spec.cache_bytes(box)) for box in boxes])


def seal_in_place(blank: Blank) -> None:
    """Writes the checksum of a chunk whose payload has been written."""
    blank.checksum[:] = checksum(blank.head, b"", blank.payload).to_bytes(8, "little")


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
    if len(chunk.payload) > MAX_CHUNK_PAYLOAD:
        raise TransferFailed(f"chunk of {box} has {len(chunk.payload)} bytes, the limit is {MAX_CHUNK_PAYLOAD}")
    expected = spec.payload_bytes(box)
    if len(chunk.payload) != expected:
        raise TransferFailed(f"chunk of {box} has {len(chunk.payload)} bytes, its shape needs {expected}")
    if len(chunk.scales) != spec.scales_bytes(box):
        raise TransferFailed(f"chunk of {box} has {len(chunk.scales)} bytes of scales, not {spec.scales_bytes(box)}")
    if head.checksum != checksum(head, chunk.scales, chunk.payload):
        raise TransferFailed(f"chunk of {box} has a wrong checksum")
    return box

"""KV chunks: a range of a sequence's KV with its bytes, sealed by the sender and checked by the receiver.

Bytes only: no sockets, no tensors. ``kv.wire`` puts chunks into messages and takes them out.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import xxhash

from overfill.errors import TransferFailed
from overfill.kv.ranges import KvRange
from overfill.kv.spec import DTYPE_BYTES, DTYPE_TO_PROTO, SCALE_BYTES, KvSpec
from overfill.rpc.constants import MAX_CHUNK_PAYLOAD, MAX_SHARED_PAYLOAD
from overfill.v1 import common_pb2, kv_pb2

Buffer: TypeAlias = "bytes | bytearray | memoryview"

TRANSFER_ID_BYTES = 16

# transfer_id, attempt, the six numbers of the range, dtype, codec, length of scales, length of payload.
_HEADER = struct.Struct("<16sI6I2I2I")


@dataclass(slots=True)
class Chunk:
    """A range and its bytes: on its way out of a cache, in a message, or on its way into a cache.

    Attributes:
        payload: keys then values, each [layers, tokens, heads, head_dim].
        header: bytes that the checksum covers before scales and payload; empty means that there is no checksum.
        checksum: XXH3-64 of header, scales and payload.
        scales: of a payload of codes, keys' then values', each [layers, tokens, heads] float32; otherwise empty.
        head: the message's fields besides scales, payload and checksum; empty for a chunk that does not travel.
    """

    range: KvRange
    payload: Buffer
    header: bytes = b""
    checksum: int = 0
    scales: Buffer = b""
    head: kv_pb2.KvChunk = field(default_factory=kv_pb2.KvChunk)

    @property
    def slot(self) -> int | None:
        """Slot of shared memory that holds the payload; None means that it travels."""
        return self.head.shared.slot if self.head.HasField("shared") else None

    @property
    def size(self) -> int:
        """Bytes of payload and scales."""
        return len(self.payload) + len(self.scales)


def digest(*parts: Buffer) -> int:
    """XXH3-64 of the parts, one after another."""
    hasher = xxhash.xxh3_64()
    for part in parts:
        hasher.update(part)
    return hasher.intdigest()


def is_damaged(chunk: Chunk) -> bool:
    """Whether ``chunk`` has a checksum that does not match."""
    return bool(chunk.header) and digest(chunk.header, chunk.scales, chunk.payload) != chunk.checksum


def num_undamaged(chunks: Sequence[Chunk]) -> int:
    """Number of chunks before the first damaged one."""
    return next((index for index, chunk in enumerate(chunks) if is_damaged(chunk)), len(chunks))


@dataclass(frozen=True, slots=True)
class TransferSpec:
    """Properties of a transfer that both ends know before its first chunk.

    Attributes:
        layers: full-model layers that travel, ascending.
        tokens: half-open range of prompt positions that travel.
    """

    transfer_id: bytes
    attempt: int
    kv: KvSpec
    layers: tuple[int, ...]
    tokens: tuple[int, int]
    codec: common_pb2.KvCodec = common_pb2.KV_CODEC_RAW

    @property
    def total_bytes(self) -> int:
        """Bytes of the whole transfer's raw KV."""
        return len(self.layers) * (self.tokens[1] - self.tokens[0]) * self.kv.token_layer_bytes

    def raw_bytes(self, kv_range: KvRange) -> int:
        """Bytes of the raw KV of ``kv_range``."""
        return kv_range.num_vectors * self.kv.head_dim * DTYPE_BYTES[self.kv.dtype]

    def payload_bytes(self, kv_range: KvRange) -> int:
        """Bytes of the payload of a chunk of ``kv_range``."""
        if self.codec == common_pb2.KV_CODEC_RAW:
            return self.raw_bytes(kv_range)
        return kv_range.num_vectors * self.kv.head_dim

    def scales_bytes(self, kv_range: KvRange) -> int:
        """Bytes of the scales of a chunk of ``kv_range``."""
        return 0 if self.codec == common_pb2.KV_CODEC_RAW else kv_range.num_vectors * SCALE_BYTES


def new_chunk(
    spec: TransferSpec, kv_range: KvRange, payload: Buffer = b"", scales: Buffer = b"", slot: int | None = None
) -> Chunk:
    """Returns a chunk of the transfer without its checksum.

    Args:
        payload: payload of ``spec.payload_bytes``; empty if it is still to be attached.
        slot: slot of shared memory that holds the payload; None puts the payload into the message.
    """
    shared = None if slot is None else kv_pb2.SharedPayload(slot=slot, length=spec.payload_bytes(kv_range))
    head = kv_pb2.KvChunk(
        transfer_id=spec.transfer_id,
        attempt=spec.attempt,
        range=kv_range.to_proto(),
        dtype=DTYPE_TO_PROTO[spec.kv.dtype],
        codec=spec.codec,
        shared=shared,
    )
    return Chunk(kv_range, payload, _header(spec, kv_range), scales=scales, head=head)


def check(spec: TransferSpec, received: Chunk) -> KvRange:
    """Returns the range of a received chunk that belongs to the transfer and is undamaged.

    ``Coverage`` checks its place.

    Raises:
        TransferFailed: transfer, attempt, dtype, codec, a length or the checksum is wrong; the message says which.
    """
    chunk = check_head(spec, received)
    if is_damaged(chunk):
        raise wrong_checksum(chunk.range)
    return chunk.range


def wrong_checksum(kv_range: KvRange) -> TransferFailed:
    """The error for a damaged chunk."""
    return TransferFailed(f"chunk of {kv_range} has a wrong checksum")


def check_head(spec: TransferSpec, received: Chunk) -> Chunk:
    """Sets the header of a received chunk and returns it; as ``check``, without comparing the checksum."""
    head, kv_range = received.head, received.range
    if head.transfer_id != spec.transfer_id:
        raise TransferFailed("chunk belongs to another transfer")
    if head.attempt != spec.attempt:
        raise TransferFailed(f"chunk belongs to attempt {head.attempt}, this is attempt {spec.attempt}")
    if head.dtype != DTYPE_TO_PROTO[spec.kv.dtype]:
        raise TransferFailed(f"chunk of {kv_range} has dtype {head.dtype}, expected {spec.kv.dtype}")
    if head.codec != spec.codec:
        raise TransferFailed(f"chunk of {kv_range} has codec {head.codec}, expected {spec.codec}")
    limit = MAX_SHARED_PAYLOAD if head.HasField("shared") else MAX_CHUNK_PAYLOAD
    size, scales_size = len(received.payload), len(received.scales)
    if size > limit:
        raise TransferFailed(f"chunk of {kv_range} has {size} bytes, the limit is {limit}")
    expected = spec.payload_bytes(kv_range)
    if size != expected:
        raise TransferFailed(f"chunk of {kv_range} has {size} bytes, its shape needs {expected}")
    expected = spec.scales_bytes(kv_range)
    if scales_size != expected:
        raise TransferFailed(f"chunk of {kv_range} has {scales_size} bytes of scales, its shape needs {expected}")
    received.header = _header(spec, kv_range)
    return received


def _header(spec: TransferSpec, kv_range: KvRange) -> bytes:
    """Returns the struct of ``KvChunk.checksum``."""
    return _HEADER.pack(
        spec.transfer_id,
        spec.attempt,
        *kv_range,
        DTYPE_TO_PROTO[spec.kv.dtype],
        spec.codec,
        spec.scales_bytes(kv_range),
        spec.payload_bytes(kv_range),
    )

"""The checksum of a KV chunk, written from the comment of ``KvChunk.checksum`` alone; and chunks that are sealed."""

import struct

import xxhash

from overfill.kv.chunks import Buffer, Chunk, TransferSpec, digest, new_chunk
from overfill.kv.ranges import KvRange
from overfill.v1 import kv_pb2


def checksum(chunk: kv_pb2.KvChunk) -> int:
    """Returns the checksum of ``chunk``, as an implementation in another language would compute it."""
    box = chunk.range
    header = chunk.transfer_id + struct.pack(
        "<11I",
        chunk.attempt,
        *(box.layer_start, box.layer_end, box.token_start, box.token_end, box.head_start, box.head_end),
        *(chunk.dtype, chunk.codec, len(chunk.scales), len(chunk.payload)),
    )
    return xxhash.xxh3_64_intdigest(header + chunk.scales + chunk.payload)


def seal(spec: TransferSpec, kv_range: KvRange, payload: Buffer, scales: Buffer = b"") -> Chunk:
    """Returns a chunk of the transfer with its checksum."""
    chunk = new_chunk(spec, kv_range, payload, scales)
    chunk.checksum = digest(chunk.header, scales, payload)
    return chunk

"""The checksum of a KV chunk, written from the comment of ``KvChunk.checksum`` alone."""

import struct

import xxhash

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

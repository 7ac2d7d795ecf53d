"""Messages of KV chunks, encoded and parsed without copying payloads through protobuf.

A message is one ``KvChunk`` with further ones in its ``also``. The generated class encodes the small fields. This
module writes the framing of ``scales`` and ``payload`` around their bytes, or slices them out of a message. It parses
every valid encoding, and every protobuf parser reads its messages. It does not look into payloads.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Sequence
from typing import Any

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

from overfill.errors import TransferFailed
from overfill.kv.chunks import Buffer, Chunk
from overfill.kv.ranges import KvRange
from overfill.v1 import kv_pb2, prefill_pb2, prefill_pb2_grpc

SERVICE = prefill_pb2.DESCRIPTOR.services_by_name["Prefill"].full_name

_SCALES, _PAYLOAD, _CHECKSUM, _ALSO = 6, 7, 8, 10
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_MAX_PARTS = 1024
"""Limit on chunks, scales and payloads of a message: each costs about 2 KiB of memory, and two bytes on the wire."""

_CHECKSUM_FIELD = struct.Struct("<BQ")

_WRITABLE = 0x200  # PyBUF_WRITE
_new_bytes = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_char_p, ctypes.c_ssize_t)(
    ("PyBytes_FromStringAndSize", ctypes.pythonapi)
)
_address = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object)(("PyBytes_AsString", ctypes.pythonapi))
_view = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int)(
    ("PyMemoryView_FromMemory", ctypes.pythonapi)
)


def join_chunks(chunks: Sequence[Chunk]) -> bytes:
    """One message of all chunks: the first, with the others in its ``also``. Every byte is copied once."""
    first, *others = map(_parts, chunks)
    for other in others:
        first += [bytes([_ALSO << 3 | _BYTES]), _varint(sum(map(len, other))), *other]
    return b"".join(first)


def _parts(chunk: Chunk) -> list[Buffer]:
    """An encoded chunk, as consecutive parts that are not joined yet."""
    parts: list[Buffer] = [chunk.head.SerializeToString()]
    for field, data in ((_SCALES, chunk.scales), (_PAYLOAD, chunk.payload if chunk.slot is None else b"")):
        if data:
            parts += [bytes([field << 3 | _BYTES]), _varint(len(data)), data]
    parts.append(_CHECKSUM_FIELD.pack(_CHECKSUM << 3 | _FIXED64, chunk.checksum))
    return parts


def lay_out_message(chunks: Sequence[Chunk], sizes: Sequence[int]) -> tuple[bytes, list[memoryview]]:
    """A message of ``chunks`` whose payloads and checksums the caller writes in place: no copy follows.

    Attaches to each chunk a payload of so many bytes, a view into the message. The message must outlive its views, and
    must not be used before they are filled.

    Returns:
        The message, and for each chunk a view of its checksum: 8 bytes, little-endian.
    """
    starts: list[bytes] = []
    for number, (chunk, length) in enumerate(zip(chunks, sizes, strict=True)):
        start = chunk.head.SerializeToString() + bytes([_PAYLOAD << 3 | _BYTES]) + _varint(length)
        if number:
            whole = len(start) + length + _CHECKSUM_FIELD.size
            start = bytes([_ALSO << 3 | _BYTES]) + _varint(whole) + start
        starts.append(start)
    message, view = _new_message(sum(map(len, starts)) + sum(sizes) + _CHECKSUM_FIELD.size * len(chunks))
    checksums: list[memoryview] = []
    position = 0
    for start, chunk, length in zip(starts, chunks, sizes, strict=True):
        payload_at = position + len(start)
        checksum_at = payload_at + length
        view[position:payload_at] = start
        view[checksum_at] = _CHECKSUM << 3 | _FIXED64
        position = checksum_at + _CHECKSUM_FIELD.size
        chunk.payload = view[payload_at:checksum_at]
        checksums.append(view[checksum_at + 1 : position])
    return message, checksums


def parse_message(message: Buffer) -> list[Chunk]:
    """All chunks of ``message``, those in its ``also`` last. Their scales and payloads are views into it.

    Raises:
        TransferFailed: it is not a valid KvChunk.
    """
    first, also = _split(memoryview(message))
    return [first, *(parse_chunk(other) for other in also)]


def parse_chunk(message: Buffer) -> Chunk:
    """The only chunk of ``message``. Raises TransferFailed if it is not a valid KvChunk, or has further chunks."""
    chunk, also = _split(memoryview(message))
    if also:
        raise TransferFailed("a chunk in `also` has an `also` of its own")
    return chunk


def _split(view: memoryview) -> tuple[Chunk, list[memoryview]]:
    rest: list[Buffer] = []
    found: dict[int, list[memoryview]] = {_SCALES: [], _PAYLOAD: [], _ALSO: []}
    position = start = 0
    try:
        while position < len(view):
            tag_at = position
            tag, position = _read_varint(view, position)
            field, kind = tag >> 3, tag & 7
            length = 0
            if kind == _VARINT:
                _, position = _read_varint(view, position)
            elif kind == _FIXED64:
                length = 8
            elif kind == _FIXED32:
                length = 4
            elif kind == _BYTES:
                length, position = _read_varint(view, position)
            else:
                raise TransferFailed(f"a chunk has a field of wire type {kind}")
            end = position + length
            if end > len(view):
                raise TransferFailed("a chunk is cut off")
            if kind == _BYTES and field in found:
                if len(rest) == _MAX_PARTS:
                    raise TransferFailed(f"a message has more than {_MAX_PARTS} parts")
                found[field].append(view[position:end])
                rest.append(view[start:tag_at])
                start = end
            position = end
        rest.append(view[start:])
        head = kv_pb2.KvChunk.FromString(b"".join(rest))
    except (DecodeError, IndexError) as error:
        raise TransferFailed(f"a message is not a valid KvChunk: {error}") from error
    # When a field is repeated by mistake, protobuf takes the last one.
    scales, payload = (found[field][-1] if found[field] else b"" for field in (_SCALES, _PAYLOAD))
    chunk = Chunk(KvRange.from_proto(head.range), payload, checksum=head.checksum, scales=scales, head=head)
    return chunk, found[_ALSO]


def add_prefill_to_server(servicer: prefill_pb2_grpc.PrefillServicer, server: Any) -> None:
    """As the generated ``add_PrefillServicer_to_server``, except that PullKv yields encoded messages."""
    handlers = {
        "Prefill": grpc.stream_stream_rpc_method_handler(
            servicer.Prefill,
            prefill_pb2.PrefillRequest.FromString,
            prefill_pb2.PrefillResponse.SerializeToString,
        ),
        "PrefillAtOnce": grpc.unary_unary_rpc_method_handler(
            servicer.PrefillAtOnce,
            prefill_pb2.StartPrefill.FromString,
            prefill_pb2.PrefillResponse.SerializeToString,
        ),
    }
    _add_handlers(server, handlers | _lending_handlers(servicer))


def add_lender_to_server(servicer: prefill_pb2_grpc.PrefillServicer, server: Any) -> None:
    """As ``add_prefill_to_server``, for a worker that lends KV and computes no prompts."""
    _add_handlers(server, _lending_handlers(servicer))


def _lending_handlers(servicer: prefill_pb2_grpc.PrefillServicer) -> dict[str, grpc.RpcMethodHandler[Any, Any]]:
    return {
        "Describe": grpc.unary_unary_rpc_method_handler(
            servicer.Describe,
            prefill_pb2.DescribePrefillRequest.FromString,
            prefill_pb2.DescribePrefillResponse.SerializeToString,
        ),
        "Lend": grpc.stream_stream_rpc_method_handler(
            servicer.Lend, prefill_pb2.LendRequest.FromString, prefill_pb2.LendResponse.SerializeToString
        ),
        "PullKv": grpc.unary_stream_rpc_method_handler(servicer.PullKv, prefill_pb2.PullKvRequest.FromString, None),
    }


def _add_handlers(server: Any, handlers: dict[str, grpc.RpcMethodHandler[Any, Any]]) -> None:
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))


def pull_kv(channel: grpc.aio.Channel, request: prefill_pb2.PullKvRequest, timeout: float | None) -> Any:
    """Opens PullKv on ``channel``; its responses are encoded messages, for ``parse_message``."""
    method: Any = channel.unary_stream(f"/{SERVICE}/PullKv", prefill_pb2.PullKvRequest.SerializeToString, None)
    return method(request, timeout=timeout)


def _new_message(size: int) -> tuple[bytes, memoryview]:
    """Uninitialised ``bytes`` and a writable view of them, which must be filled before the bytes are used.

    gRPC sends only ``bytes``, and Python's own way to make ``bytes`` copies everything once more.
    """
    message = _new_bytes(None, size)
    return message, _view(_address(message), size, _WRITABLE)


def _varint(number: int) -> bytes:
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)


def _read_varint(view: memoryview, position: int) -> tuple[int, int]:
    """The number at ``position``, and the position after it. Raises IndexError at the end of ``view``."""
    result = shift = 0
    while True:
        byte = view[position]
        position += 1
        result |= (byte & 0x7F) << shift
        if byte < 0x80:
            return result, position
        shift += 7
        if shift > 63:
            raise TransferFailed("a chunk has a number of more than 64 bits")

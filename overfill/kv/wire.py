"""``KvChunk`` on the wire without copying its payload: protobuf's framing written and read by hand around it.

The small fields go through the generated class; ``scales`` and ``payload`` are sliced out of the message, or joined
into it. Any valid encoding is read, and what is written any protobuf reader understands. Knows nothing of what is in a
chunk.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

from overfill.errors import TransferFailed
from overfill.v1 import kv_pb2, prefill_pb2, prefill_pb2_grpc

Buffer: TypeAlias = "bytes | bytearray | memoryview"
Frame: TypeAlias = list[Buffer]
"""A chunk's message in pieces."""

SERVICE = prefill_pb2.DESCRIPTOR.services_by_name["Prefill"].full_name

_SCALES, _PAYLOAD, _CHECKSUM, _ALSO = 6, 7, 8, 10
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_CHECKSUM_FIELD = struct.Struct("<BQ")

_WRITABLE = 0x200  # PyBUF_WRITE
_new_bytes = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_char_p, ctypes.c_ssize_t)(
    ("PyBytes_FromStringAndSize", ctypes.pythonapi)
)
_address = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object)(("PyBytes_AsString", ctypes.pythonapi))
_view = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int)(
    ("PyMemoryView_FromMemory", ctypes.pythonapi)
)


@dataclass(slots=True)
class WireChunk:
    """A chunk as it came: ``head`` has all fields but the two long ones, which are views into the message."""

    head: kv_pb2.KvChunk
    scales: Buffer
    payload: Buffer


def frame(head: kv_pb2.KvChunk, scales: Buffer, payload: Buffer, checksum: int) -> Frame:
    """A chunk's message in pieces, of which ``scales`` and ``payload`` are two. ``head`` must not have the checksum."""
    parts: list[Buffer] = [head.SerializeToString()]
    for field, data in ((_SCALES, scales), (_PAYLOAD, payload)):
        if data:
            parts += [bytes([field << 3 | _BYTES]), _varint(len(data)), data]
    parts.append(_CHECKSUM_FIELD.pack(_CHECKSUM << 3 | _FIXED64, checksum))
    return parts


def join(frames: Sequence[Frame]) -> bytes:
    """One message of all chunks: the first, with the others in its ``also``. Every byte is copied once."""
    parts = list(frames[0])
    for other in frames[1:]:
        parts += [bytes([_ALSO << 3 | _BYTES]), _varint(sum(map(len, other))), *other]
    return b"".join(parts)


@dataclass(slots=True)
class Blank:
    """A chunk whose payload and checksum are yet to be written into the message that it is part of."""

    head: kv_pb2.KvChunk
    payload: memoryview
    checksum: memoryview


def lay_out(chunks: Sequence[tuple[kv_pb2.KvChunk, int]]) -> tuple[bytes, list[Blank]]:
    """As ``join``, but that payloads are written where they leave from, without a copy: heads and lengths of payloads.

    The message must outlive the use of the blanks, and nobody else may see it before they are written.
    """
    starts: list[bytes] = []
    for number, (head, length) in enumerate(chunks):
        start = head.SerializeToString() + bytes([_PAYLOAD << 3 | _BYTES]) + _varint(length)
        if number:
            whole = len(start) + length + _CHECKSUM_FIELD.size
            start = bytes([_ALSO << 3 | _BYTES]) + _varint(whole) + start
        starts.append(start)
    message, view = _unwritten(sum(len(s) + n + _CHECKSUM_FIELD.size for s, (_, n) in zip(starts, chunks, strict=True)))
    blanks: list[Blank] = []
    position = 0
    for start, (head, length) in zip(starts, chunks, strict=True):
        payload_at = position + len(start)
        checksum_at = payload_at + length
        view[position:payload_at] = start
        view[checksum_at] = _CHECKSUM << 3 | _FIXED64
        position = checksum_at + _CHECKSUM_FIELD.size
        blanks.append(Blank(head, view[payload_at:checksum_at], view[checksum_at + 1 : position]))
    return message, blanks


def decode_all(message: Buffer) -> list[WireChunk]:
    """Every chunk in ``message``, those in its ``also`` last. Raises TransferFailed when it is no KvChunk."""
    chunk, also = _split(memoryview(message))
    return [chunk, *(decode(other) for other in also)]


def decode(message: Buffer) -> WireChunk:
    """The chunk that ``message`` is. Raises TransferFailed when it is no KvChunk, or more than one."""
    chunk, also = _split(memoryview(message))
    if also:
        raise TransferFailed("a chunk has others in it")
    return chunk


def _split(view: memoryview) -> tuple[WireChunk, list[memoryview]]:
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
                raise TransferFailed(f"a chunk has a field of kind {kind}")
            end = position + length
            if end > len(view):
                raise TransferFailed("a chunk is cut off")
            if kind == _BYTES and field in found:
                found[field].append(view[position:end])
                rest.append(view[start:tag_at])
                start = end
            position = end
        rest.append(view[start:])
        head = kv_pb2.KvChunk.FromString(b"".join(rest))
    except (DecodeError, IndexError) as error:
        raise TransferFailed(f"a message is no KV chunk: {error}") from error
    # Of a field that is repeated by mistake, protobuf takes the last one.
    scales, payload = (found[field][-1] if found[field] else b"" for field in (_SCALES, _PAYLOAD))
    return WireChunk(head, scales, payload), found[_ALSO]


def add_prefill_to_server(servicer: prefill_pb2_grpc.PrefillServicer, server: Any) -> None:
    """As the generated ``add_PrefillServicer_to_server``, but that PullKv yields encoded chunks."""
    handlers: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
        "Describe": grpc.unary_unary_rpc_method_handler(
            servicer.Describe,
            prefill_pb2.DescribePrefillRequest.FromString,
            prefill_pb2.DescribePrefillResponse.SerializeToString,
        ),
        "Prefill": grpc.stream_stream_rpc_method_handler(
            servicer.Prefill,
            prefill_pb2.PrefillRequest.FromString,
            prefill_pb2.PrefillResponse.SerializeToString,
        ),
        "PullKv": grpc.unary_stream_rpc_method_handler(servicer.PullKv, prefill_pb2.PullKvRequest.FromString, None),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))


def pull_kv(channel: grpc.aio.Channel, request: prefill_pb2.PullKvRequest, timeout: float | None) -> Any:
    """Opens PullKv on ``channel``; its responses are encoded chunks, for ``decode``."""
    method: Any = channel.unary_stream(f"/{SERVICE}/PullKv", prefill_pb2.PullKvRequest.SerializeToString, None)
    return method(request, timeout=timeout)


def _unwritten(size: int) -> tuple[bytes, memoryview]:
    """Bytes as C code makes them, to be written before anybody sees them, and what to write them through.

    gRPC sends nothing but ``bytes``, and Python fills those from something else only: one more copy of everything.
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
    """The number at ``position`` and where the next field begins. Raises IndexError at the end."""
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

"""What a process and its helper say to each other about trials of grammars, as frames over a pair of sockets.

A frame is a number, a length and a body. The body of a request names a function ``module:name``, a zero byte, and the
function's argument. A reply has one byte for the outcome, and a text.
"""

from __future__ import annotations

import socket
import struct

OK, INVALID, TOO_COMPLEX, LATE = b"O", b"I", b"C", b"L"
"""Outcomes: the function's result; JSON of field and message; why the child died; nothing, for lack of CPU."""

WALL_FACTOR = 15
"""Seconds that a trial may last for each second of CPU time that it may take."""

_HEADER = struct.Struct("!QI")


def write_frame(connection: socket.socket, number: int, body: bytes) -> None:
    """Sends a frame. Raises OSError if the other side has ended."""
    connection.sendall(_HEADER.pack(number, len(body)) + body)


def read_frame(connection: socket.socket) -> tuple[int, bytes] | None:
    """Returns number and body of the next frame; None if the other side has ended."""
    header = _read(connection, _HEADER.size)
    if header is None:
        return None
    number, length = _HEADER.unpack(header)
    body = _read(connection, length)
    return None if body is None else (number, body)


def _read(connection: socket.socket, length: int) -> bytes | None:
    data = bytearray()
    while len(data) < length:
        try:
            part = connection.recv(min(length - len(data), 1 << 20))
        except ConnectionError:
            return None
        if not part:
            return None
        data += part
    return bytes(data)

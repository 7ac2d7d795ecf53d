"""Raw HTTP/2 frames, for connections that no gRPC client would make."""

from __future__ import annotations

import struct

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RESET, SETTINGS, PING, GOAWAY, WINDOW = 0, 1, 3, 4, 6, 7, 8
END_STREAM, END_HEADERS = 1, 4
INITIAL_WINDOW = 4


def frame(kind, flags, stream, payload=b""):
    return struct.pack(">I", len(payload))[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + payload


def settings(**values):
    numbers = {"window": INITIAL_WINDOW, "max_frame": 5, "table": 1, "streams": 3}
    return frame(SETTINGS, 0, 0, b"".join(struct.pack(">HI", numbers[k], v) for k, v in values.items()))


def headers(method, extra=()):
    """Encodes headers by HPACK without its tables, every field in full."""
    fields = [
        (":method", "POST"), (":scheme", "http"), (":path", method), (":authority", "x"),
        ("te", "trailers"), ("content-type", "application/grpc"), *extra,
    ]  # fmt: skip
    out = b""
    for name, value in fields:
        out += b"\0" + _length(len(name)) + name.encode() + _length(len(value)) + value.encode()
    return out


def message(data):
    """Returns ``data`` with the five bytes of prefix that gRPC gives a message."""
    return b"\0" + struct.pack(">I", len(data)) + data


def _length(size):
    if size < 127:
        return bytes([size])
    out, size = b"\x7f", size - 127
    while size > 127:
        out += bytes([size & 127 | 128])
        size >>= 7
    return out + bytes([size])


def open_call(method, data=b"", stream=1, window=0, end=True):
    """Returns the first bytes of a connection and one RPC, with a flow-control window of ``window`` bytes."""
    start = PREFACE + settings(window=window) + frame(HEADERS, END_HEADERS, stream, headers(method))
    return start + frame(DATA, END_STREAM if end else 0, stream, message(data))


def broken(rng, method):
    """Returns the bytes of a connection that violates HTTP/2 in one place."""
    good = PREFACE + settings(window=65535)
    call = frame(HEADERS, END_HEADERS, 1, headers(method))
    return rng.choice((
        lambda: rng.randbytes(rng.randint(1, 400)),
        lambda: PREFACE[: rng.randint(1, 23)],
        lambda: PREFACE + rng.randbytes(rng.randint(9, 200)),
        lambda: good + call[: rng.randint(1, len(call) - 1)],
        lambda: good + frame(HEADERS, END_HEADERS, 2, headers(method)),  # even stream ids belong to the server
        lambda: good + frame(DATA, 0, 1, b"x"),  # a frame of a stream that does not exist
        lambda: good + frame(HEADERS, END_HEADERS, 1, rng.randbytes(40)),
        lambda: good + call + frame(DATA, END_STREAM, 1, b"\0\xff\xff\xff\xff" + b"x" * 50),
        lambda: good + call + frame(DATA, END_STREAM, 1, b"\x01\0\0\0\x04abcd"),  # not compressed as flagged
        lambda: good + call + frame(DATA, END_STREAM, 1, b"\0\0\0\0\x04a"),
        lambda: good + call + frame(RESET, 0, 1, struct.pack(">I", rng.randrange(20))),
        lambda: good + frame(WINDOW, 0, 0, struct.pack(">I", rng.choice((0, (1 << 31) - 1)))),
        lambda: good + frame(PING, 0, 0, b"1234567") + call,
        lambda: good + frame(SETTINGS, 0, 0, struct.pack(">HI", rng.randrange(9), rng.getrandbits(32))) + call,
        lambda: good + struct.pack(">I", 1 << 23)[1:] + bytes([DATA, 0]) + struct.pack(">I", 1) + b"x" * 100,
        lambda: good + frame(HEADERS, END_HEADERS, 1, headers(method, [("x-long", "y" * rng.choice((100, 40_000)))])),
        lambda: good + frame(HEADERS, END_HEADERS, 1, headers(method, [("grpc-timeout", "1Z")])),
        lambda: good + frame(HEADERS, END_HEADERS, 1, headers(method, [("authorization", "Basic ==")])),
        lambda: good + frame(HEADERS, END_HEADERS, 1, headers("/" + "x" * rng.choice((1, 9000)))),
        lambda: good + frame(GOAWAY, 0, 0, bytes(8)) + call,
        lambda: b"GET /metrics HTTP/1.1\r\nhost: x\r\n\r\n",
        lambda: b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + rng.randbytes(200),
    ))()  # fmt: skip

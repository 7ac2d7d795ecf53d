"""Makes malformed messages from valid ones: changes fields by their descriptors, then bytes.

All choices come from one random generator, so that a case can be made again from its number.
"""

from __future__ import annotations

from google.protobuf.descriptor import FieldDescriptor

INTEGERS = (0, 1, -1, 2, 15, 16, 17, 127, 128, 255, 256, 511, 512, 513, 65535, 1 << 20, (1 << 31) - 1, 1 << 31,
            (1 << 32) - 1, (1 << 63) - 1, (1 << 64) - 1, -(1 << 31), -(1 << 63))  # fmt: skip
FLOATS = (0.0, -0.0, 1.0, -1.0, 0.5, 1e-45, 1e38, -1e38, 1e308, float("nan"), float("inf"), float("-inf"), 2.0, 100.0)
STRINGS = ("", "x", "\0", "default", "tiny", "decode-0", "prefill-0", "é" * 50, "\u202e", "x" * 5000, "../../etc/x",
           "127.0.0.1:1", "unix:/tmp/none", "dns:///x", "[::1]:0", "{", '{"type": "object"}', "(a+)+$", "start: start",
           "%s%n", "user", "assistant", "tool", "\N{GRINNING FACE}")  # fmt: skip
BYTES = (b"", b"\0", b"\xff" * 16, bytes(16), bytes(range(16)), b"x" * 17, b"x" * 5000)

_RANGES = {
    FieldDescriptor.CPPTYPE_INT32: (-(1 << 31), (1 << 31) - 1),
    FieldDescriptor.CPPTYPE_UINT32: (0, (1 << 32) - 1),
    FieldDescriptor.CPPTYPE_INT64: (-(1 << 63), (1 << 63) - 1),
    FieldDescriptor.CPPTYPE_UINT64: (0, (1 << 64) - 1),
}


def scalar(rng, field):
    """Returns a value for a scalar field, more often from the ends of its range than from between."""
    kind = field.cpp_type
    if kind in _RANGES:
        low, high = _RANGES[kind]
        fitting = [value for value in INTEGERS if low <= value <= high]
        return rng.choice(fitting) if rng.random() < 0.8 else rng.randint(low, high)
    if kind in (FieldDescriptor.CPPTYPE_FLOAT, FieldDescriptor.CPPTYPE_DOUBLE):
        value = rng.choice(FLOATS)
        return value if kind == FieldDescriptor.CPPTYPE_DOUBLE or abs(value) < 1e39 or value != value else 1e38
    if kind == FieldDescriptor.CPPTYPE_BOOL:
        return rng.random() < 0.5
    if kind == FieldDescriptor.CPPTYPE_ENUM:
        return rng.choice((0, 1, 2, 3, 4, 99, -1, (1 << 31) - 1))
    return rng.choice(BYTES) if field.type == FieldDescriptor.TYPE_BYTES else rng.choice(STRINGS)


def _repeated(field):
    return field.label == FieldDescriptor.LABEL_REPEATED


def fill(rng, message, depth=0):
    """Sets about half of a message's fields to random values."""
    for field in message.DESCRIPTOR.fields:
        if rng.random() < 0.5:
            put(rng, message, field, depth)


def put(rng, message, field, depth=0):
    """Sets one field to a random value."""
    name = field.name
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        key, value = field.message_type.fields_by_name["key"], field.message_type.fields_by_name["value"]
        for _ in range(rng.choice((1, 3, 1500))):
            getattr(message, name)[scalar(rng, key)] = scalar(rng, value)
    elif _repeated(field):
        for _ in range(rng.choice((1, 2, 5, 600 if field.message_type is None else 20))):
            if field.message_type is not None:
                added = getattr(message, name).add()
                if depth < 3:
                    fill(rng, added, depth + 1)
            else:
                getattr(message, name).append(scalar(rng, field))
    elif field.message_type is not None:
        inner = getattr(message, name)
        inner.SetInParent()
        if depth < 3:
            fill(rng, inner, depth + 1)
    else:
        setattr(message, name, scalar(rng, field))


def mutate(rng, message):
    """Returns a copy of ``message`` with one to three fields, at any depth, changed, cleared or doubled."""
    copy = type(message)()
    copy.CopyFrom(message)
    for _ in range(rng.randint(1, 3)):
        inner = copy
        while True:
            fields = list(inner.DESCRIPTOR.fields)
            if not fields:
                break
            field = rng.choice(fields)
            deeper = field.message_type is not None and not _repeated(field) and inner.HasField(field.name)
            if deeper and rng.random() < 0.8:
                inner = getattr(inner, field.name)
                continue
            if rng.random() < 0.3:
                inner.ClearField(field.name)
            else:
                put(rng, inner, field)
            break
    return copy


def damage(rng, data):
    """Returns ``data`` with damage that no encoder produces."""
    data = bytearray(data)
    kind = rng.randrange(9)
    if kind == 0 and data:  # flipped bits
        for _ in range(rng.randint(1, 8)):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif kind == 1:  # cut off
        del data[rng.randrange(len(data) + 1) :]
    elif kind == 2:  # a number without an end
        data += b"\x08" + b"\xff" * rng.choice((10, 11, 5000))
    elif kind == 3:  # a length beyond the end
        data += b"\x0a" + b"\xff\xff\xff\xff\x07" + b"x"
    elif kind == 4:  # an unclosed group, or an undefined wire type
        data += bytes([rng.choice((0x0B, 0x0C, 0x0E, 0x0F, 0x07))]) * rng.choice((1, 200))
    elif kind == 5:  # text that is not UTF-8, in any field
        data += bytes([(rng.randint(1, 12) << 3) | 2, 3]) + b"\xff\xfe\xfd"
    elif kind == 6:  # messages in messages
        for _ in range(rng.choice((20, 150))):
            data = bytearray(bytes([(rng.randint(1, 12) << 3) | 2]) + _varint(len(data)) + bytes(data))
    elif kind == 7:  # unknown fields, and field 0
        data += rng.choice((b"\x00\x00", b"\xfa\xff\xff\xff\x0f\x01x", b"\xf8\x7f\x01"))
    else:
        data = bytearray(rng.randbytes(rng.choice((1, 7, 100, 3000))))
    return bytes(data)


def _varint(value):
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)

"""Tests that a chunk with any fault is refused with a reason."""

import dataclasses

import pytest
from google.protobuf.message import DecodeError
from hypothesis import given, settings
from hypothesis import strategies as st
from kv_checksums import checksum, seal

from overfill.errors import TransferFailed
from overfill.kv.chunks import Chunk, TransferSpec, check, digest, new_chunk
from overfill.kv.ranges import KvRange
from overfill.kv.spec import KvSpec, RopeSpec
from overfill.kv.wire import join_chunks, lay_out_message, parse_chunk, parse_message
from overfill.v1 import common_pb2, kv_pb2

KV = KvSpec(num_layers=4, num_kv_heads=2, head_dim=4, dtype="float32", rope=RopeSpec())
SPEC = TransferSpec(b"0123456789abcdef", 1, KV, (0, 1, 2, 3), (0, 8))
BOX = KvRange(1, 3, 2, 5, 0, 2)


def sealed(payload=None):
    payload = bytes(i % 251 for i in range(SPEC.payload_bytes(BOX))) if payload is None else payload
    return kv_pb2.KvChunk.FromString(join_chunks([seal(SPEC, BOX, payload)]))


def received(chunk):
    return parse_chunk(chunk.SerializeToString())


def test_a_good_chunk_survives_the_wire():
    assert check(SPEC, received(sealed())) == BOX


@settings(deadline=None)
@given(
    st.builds(
        kv_pb2.KvChunk,
        transfer_id=st.binary(max_size=20),
        attempt=st.integers(0, 2**32 - 1),
        range=st.builds(kv_pb2.KvRange, layer_start=st.integers(0, 2**32 - 1), head_end=st.integers(0, 2**32 - 1)),
        dtype=st.integers(0, 300),
        codec=st.integers(0, 300),
        scales=st.binary(max_size=300),
        payload=st.binary(max_size=70_000),
        checksum=st.integers(0, 2**64 - 1),
        shared=st.none() | st.builds(kv_pb2.SharedPayload, slot=st.integers(0, 300), length=st.integers(0, 2**32 - 1)),
    )
)
def test_messages_framed_by_hand_equal_those_of_the_generated_class(chunk):
    wire = parse_chunk(chunk.SerializeToString())
    assert (bytes(wire.scales), bytes(wire.payload)) == (chunk.scales, chunk.payload)
    head = kv_pb2.KvChunk()
    head.CopyFrom(chunk)
    head.ClearField("scales")
    head.ClearField("payload")
    assert wire.head == head
    head.ClearField("checksum")
    payload = b"" if chunk.HasField("shared") else memoryview(chunk.payload)
    sent = Chunk(BOX, payload, checksum=chunk.checksum, scales=chunk.scales, head=head)
    if chunk.HasField("shared"):
        chunk.ClearField("payload")
    assert kv_pb2.KvChunk.FromString(join_chunks([sent])) == chunk


def test_payloads_written_in_place_are_the_message_that_joining_makes():
    boxes = [KvRange(layer, layer + 1, 2, 5, 0, 2) for layer in (0, 1, 3)]
    payloads = [bytes([n + 1]) * SPEC.payload_bytes(box) for n, box in enumerate(boxes)]
    chunks = [new_chunk(SPEC, box) for box in boxes]
    message, checksums = lay_out_message(chunks, [len(payload) for payload in payloads])
    for chunk, place, payload in zip(chunks, checksums, payloads, strict=True):
        chunk.payload[:] = payload
        place[:] = digest(chunk.header, payload).to_bytes(8, "little")
    assert message == join_chunks([seal(SPEC, box, payload) for box, payload in zip(boxes, payloads, strict=True)])


def test_several_chunks_in_one_message_are_read_as_several():
    boxes = [KvRange(layer, layer + 1, 2, 5, 0, 2) for layer in (0, 1, 3)]
    payloads = [bytes([n]) * SPEC.payload_bytes(box) for n, box in enumerate(boxes)]
    message = join_chunks([seal(SPEC, box, payload) for box, payload in zip(boxes, payloads, strict=True)])
    chunks = parse_message(message)
    assert [check(SPEC, chunk) for chunk in chunks] == boxes
    assert [bytes(chunk.payload) for chunk in chunks] == payloads
    read = kv_pb2.KvChunk.FromString(message)  # as any protobuf parser reads it
    assert [read.payload, *(other.payload for other in read.also)] == payloads
    with pytest.raises(TransferFailed, match="of its own"):
        parse_chunk(message)


@settings(deadline=None)
@given(st.binary(max_size=200))
def test_bytes_that_are_not_a_message_are_refused(data):
    try:
        expected = kv_pb2.KvChunk.FromString(data)
    except DecodeError:
        # Groups, which protobuf skips, are refused here too.
        with pytest.raises(TransferFailed):
            parse_chunk(data)
        return
    try:
        wire = parse_chunk(data)
    except TransferFailed:
        return
    assert bytes(wire.payload) == expected.payload


def test_a_message_that_is_cut_off_is_refused():
    message = sealed().SerializeToString()
    for end in range(1, len(message)):
        with pytest.raises(TransferFailed):
            check(SPEC, parse_chunk(message[:end]))


def test_the_checksum_is_the_one_that_the_proto_file_defines():
    chunk = sealed()
    assert chunk.checksum == checksum(chunk)


def change(**fields):
    chunk = sealed()
    for name, value in fields.items():
        setattr(chunk, name, value)
    chunk.checksum = checksum(chunk)
    return chunk


@pytest.mark.parametrize(
    ("chunk", "reason"),
    [
        (change(transfer_id=b"fedcba9876543210"), "another transfer"),
        (change(attempt=2), "attempt 2"),
        (change(dtype=common_pb2.DTYPE_BFLOAT16), "dtype"),
        (change(codec=7), "codec"),
        (change(scales=b"\0\0\0\0"), "scales"),
        (change(payload=b"\0" * 380), "its shape needs"),
        (sealed(b"\0" * 388), "its shape needs"),
    ],
)
def test_a_wrong_field_is_named_though_the_checksum_fits(chunk, reason):
    with pytest.raises(TransferFailed, match=reason):
        check(SPEC, received(chunk))


def test_a_payload_above_the_limit_is_refused():
    long = dataclasses.replace(SPEC, tokens=(0, 10**6))
    message = join_chunks([seal(long, KvRange(0, 1, 0, 20_000, 0, 2), b"\0" * (2 * 20_000 * 2 * 4 * 4))])
    with pytest.raises(TransferFailed, match="the limit is"):
        check(long, parse_chunk(message))


@given(st.integers(0, 383), st.integers(1, 255))
def test_any_changed_byte_of_the_payload_is_detected(position, flip):
    chunk = sealed()
    payload = bytearray(chunk.payload)
    payload[position] ^= flip
    chunk.payload = bytes(payload)
    with pytest.raises(TransferFailed, match="checksum"):
        check(SPEC, received(chunk))


@given(st.sampled_from(["layer_start", "layer_end", "token_start", "token_end", "head_start", "head_end"]))
def test_a_moved_range_is_detected(name):
    chunk = sealed()
    setattr(chunk.range, name, getattr(chunk.range, name) + 1)
    with pytest.raises(TransferFailed):
        check(SPEC, received(chunk))

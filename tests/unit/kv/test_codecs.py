"""Tests that the codec's error stays within its stated bound for any values, and that both ends check scales."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kv_checksums import seal

from overfill.errors import TransferFailed
from overfill.kv.cache import KvCache
from overfill.kv.chunks import Chunk, TransferSpec, check
from overfill.kv.codecs import decode, encode, quantise, restore
from overfill.kv.ranges import KvRange
from overfill.kv.sender import KvSender
from overfill.kv.spec import KvSpec, RopeSpec
from overfill.kv.tensors import TORCH_DTYPES
from overfill.kv.wire import join_chunks, parse_message
from overfill.request.names import CODECS

SMALLEST = {"float32": 0.0, "bfloat16": 2**-8, "float16": 2**-11}  # relative to the element: the rounding of its type


def bound(vectors, dtype):
    """The largest error that the module's docstring allows, for each element."""
    largest = vectors.abs().amax(-1, keepdim=True)
    error = (largest / 254).expand_as(vectors)
    return error * (1 + 1e-5) + SMALLEST[dtype] * 1.1 * vectors.abs() + 1e-7 * largest + SMALLEST[dtype] * error


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@settings(deadline=None)
@given(scale=st.floats(1e-2, 1e2), seed=st.integers(0, 2**31))
def test_the_error_of_every_element_is_within_what_is_stated(dtype, scale, seed):
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.randn(20, 64, generator=generator) * scale
    vectors[:, 3] *= 30  # keys have outlier channels
    vectors[0] = 0
    vectors = vectors.to(TORCH_DTYPES[dtype])
    raw = memoryview(bytearray(vectors.view(torch.uint8).numpy().tobytes()))
    scales, payload = encode(dtype, 64, raw)
    assert len(payload) == 20 * 64
    assert len(scales) == 20 * 4
    data = bytearray(decode(dtype, 64, bytes(scales), bytes(payload)))
    back = torch.frombuffer(data, dtype=TORCH_DTYPES[dtype]).view(20, 64)
    wide = vectors.float()
    assert ((back.float() - wide).abs() <= bound(wide, dtype)).all()
    assert back[0].count_nonzero() == 0


def test_a_vector_does_not_depend_on_its_neighbours():
    vectors = torch.randn(4, 16)
    alone = restore(*quantise(vectors[1:2]), torch.float32)
    assert torch.equal(restore(*quantise(vectors), torch.float32)[1:2], alone)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_scale_that_is_not_finite_is_refused(bad):
    with pytest.raises(TransferFailed, match="scale"):
        decode("float32", 4, np.array([bad], np.float32).tobytes(), bytes(4))


async def test_chunks_go_through_the_codec_and_take_half_the_bytes():
    cache = KvCache(KvSpec(3, 2, 64, "bfloat16", RopeSpec()), 4, 16, torch.device("cpu"))
    cache.k.normal_()
    cache.v.normal_()
    spec = TransferSpec(b"x" * 16, 0, cache.spec, (0, 1, 2), (0, 50), CODECS["int8"])
    whole = KvRange(0, 3, 0, 50, 0, 2)
    with ThreadPoolExecutor(1) as executor:
        sender = KvSender(spec, cache, executor)
        sender.begin([2, 0, 3, 1], 50, None)
        chunks = [chunk async for message in sender.messages([whole]) for chunk in parse_message(message)]
    assert len(chunks) == 1
    assert check(spec, chunks[0]) == whole
    assert len(chunks[0].payload) + len(chunks[0].scales) == spec.raw_bytes(whole) * 68 // 128
    raw = bytearray(spec.raw_bytes(whole))
    cache.read([2, 0, 3, 1], [Chunk(whole, raw)], {})
    back = decode("bfloat16", 64, chunks[0].scales, chunks[0].payload)
    ours, theirs = (torch.frombuffer(bytearray(data), dtype=torch.bfloat16).float() for data in (back, raw))
    assert (ours - theirs).abs().max() < 0.2
    assert torch.nn.functional.cosine_similarity(ours, theirs, dim=0) > 0.999


def test_scales_are_checked_and_covered_by_the_checksum():
    kv = KvSpec(1, 1, 4, "float32", RopeSpec())
    spec = TransferSpec(b"x" * 16, 0, kv, (0,), (0, 2), CODECS["int8"])
    box = KvRange(0, 1, 0, 2, 0, 1)
    (good,) = parse_message(join_chunks([seal(spec, box, bytes(16), bytes(16))]))
    assert check(spec, good) == box
    (short,) = parse_message(join_chunks([seal(spec, box, bytes(16), bytes(12))]))
    with pytest.raises(TransferFailed, match="bytes of scales"):
        check(spec, short)
    good.scales = bytes([1, *bytes(15)])
    with pytest.raises(TransferFailed, match="checksum"):
        check(spec, good)

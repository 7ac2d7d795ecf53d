"""Tests that a cache of int8 codes returns the values that the int8 codec gives, however they were written."""

import pytest
import torch

from overfill.errors import TransferFailed
from overfill.kv.cache import KvCache, copy_sequence
from overfill.kv.chunks import Chunk, digest
from overfill.kv.codecs import check_scales, encode, quantise, restore
from overfill.kv.ranges import KvRange
from overfill.kv.spec import DTYPE_BYTES, KvSpec, RopeSpec
from overfill.kv.store import LayerTargets
from overfill.v1 import common_pb2

CPU = torch.device("cpu")
SPEC = KvSpec(3, 2, 8, "bfloat16", RopeSpec())
INT8 = common_pb2.KV_CODEC_INT8
TABLE = [5, 0, 3]


def read_range(cache: KvCache, table: list[int], kv_range: KvRange) -> bytearray:
    payload = bytearray(kv_range.num_vectors * cache.spec.head_dim * DTYPE_BYTES[cache.spec.dtype])
    cache.read(table, [Chunk(kv_range, payload)], {})
    return payload


def filled(spec: KvSpec = SPEC) -> KvCache:
    cache = KvCache(spec, 6, 4, CPU)
    cache.k.normal_()
    cache.v.normal_(std=5)
    return cache


def rounded(vectors: torch.Tensor) -> torch.Tensor:
    return restore(*quantise(vectors), vectors.dtype)


def test_an_int8_cache_takes_half_of_the_bytes_and_the_scales() -> None:
    assert KvCache(SPEC, 6, 4, CPU, "int8").token_bytes == 3 * 2 * 2 * (8 + 4)
    assert KvCache(SPEC, 6, 4, CPU, "int8").block_bytes == 4 * 3 * 2 * 2 * (8 + 4)
    assert KvCache(SPEC, 6, 4, CPU).lossless
    assert not KvCache(SPEC, 6, 4, CPU, "int8").lossless


def test_new_tokens_read_back_as_the_codec_rounds_them() -> None:
    cache, slots = KvCache(SPEC, 6, 4, CPU, "int8"), torch.tensor([9, 2, 23])
    k, v = torch.randn(2, 3, 2, 8).bfloat16()
    cache.put(1, slots, k, v)
    scratch = (cache.new_scratch(3), cache.new_scratch(3))
    for found in (cache.gather(1, slots), cache.gather(1, slots, scratch)):
        assert torch.equal(found[0], rounded(k))
        assert torch.equal(found[1], rounded(v))
    assert torch.equal(scratch[0], rounded(k))
    assert not cache.gather(1, torch.tensor([3]))[0].any()
    assert not cache.gather(0, slots)[0].any()


def test_a_sequence_is_copied_from_a_cache_of_any_kind() -> None:
    source, target = filled(), KvCache(SPEC, 6, 4, CPU, "int8")
    copy_sequence(source, TABLE, target, [1, 2, 4], [2, 0, 1], 10)
    taken, placed = source.slots(TABLE, 0, 10), target.slots([1, 2, 4], 0, 10)
    for row, layer in enumerate([2, 0, 1]):
        for found, given in zip(target.gather(row, placed), source.gather(layer, taken), strict=True):
            assert torch.equal(found, rounded(given))


@pytest.mark.parametrize("heads", [(0, 2), (1, 2)])
def test_raw_bytes_are_rounded_and_codes_stored_as_they_came(heads: tuple[int, int]) -> None:
    """Payloads of raw KV and of the int8 codec give the same cache."""
    source = filled()
    kv_range = KvRange(0, 2, 1, 10, *heads)
    raw = read_range(source, TABLE, kv_range)
    scales, codes = encode("bfloat16", 8, memoryview(bytearray(raw)))
    caches = [KvCache(SPEC, 6, 4, CPU, "int8") for _ in range(2)]
    targets = LayerTargets({0: [2], 1: [0, 1]})
    chunks = [Chunk(kv_range, raw), Chunk(kv_range, codes, scales=scales)]
    for cache, chunk in zip(caches, chunks, strict=True):
        assert cache.write([1, 2, 4], targets, [chunk]) == 1
    for name in ("k", "v", "k_scales", "v_scales"):
        assert torch.equal(getattr(caches[0], name), getattr(caches[1], name)), name
    vectors = torch.frombuffer(bytearray(raw), dtype=torch.bfloat16).view(2, 2, 9, heads[1] - heads[0], 8)
    for layer, rows in ((0, [2]), (1, [0, 1])):
        for row in rows:
            found = caches[1].gather(row, caches[1].slots([1, 2, 4], 1, 10))
            for half in (0, 1):
                assert torch.equal(found[half][:, heads[0] : heads[1]], rounded(vectors[half, layer]))
    again = read_range(caches[1], [1, 2, 4], KvRange(2, 3, 1, 10, *heads))
    found = torch.frombuffer(bytearray(again), dtype=torch.bfloat16).view(vectors[:, 0].shape)
    assert torch.equal(found, rounded(vectors[:, 0]))
    out = Chunk(KvRange(2, 3, 1, 10, *heads), bytearray(len(again)), b"header")
    caches[1].read([1, 2, 4], [out], {})
    assert (bytes(out.payload), out.checksum) == (bytes(again), digest(b"header", again))


@pytest.mark.parametrize("flipped", ["payload", "scales"])
def test_a_flipped_bit_of_codes_or_scales_is_noticed(flipped: str) -> None:
    kv_range = KvRange(0, 1, 0, 4, 0, 2)
    raw = read_range(filled(), TABLE, kv_range)
    scales, codes = (bytearray(part) for part in encode("bfloat16", 8, memoryview(bytearray(raw))))
    checksum = digest(b"h", scales, codes)
    whole = Chunk(kv_range, bytes(codes), b"h", checksum, bytes(scales))
    (codes if flipped == "payload" else scales)[3] ^= 16
    damaged = Chunk(kv_range, codes, b"h", checksum, scales)
    cache = KvCache(SPEC, 6, 4, CPU, "int8")
    assert cache.write([1], LayerTargets({0: [0]}), [whole, damaged]) == 1


def test_scales_must_be_finite() -> None:
    check_scales(torch.tensor([0.0, 1.0]).numpy().tobytes())
    for bad in (float("nan"), float("inf")):
        with pytest.raises(TransferFailed, match="scale"):
            check_scales(torch.tensor([1.0, bad]).numpy().tobytes())

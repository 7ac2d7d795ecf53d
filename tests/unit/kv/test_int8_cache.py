"""A cache of int8 codes: what comes out is what the int8 codec makes of what went in, however it went in."""

import pytest
import torch

from overfill.errors import TransferFailed
from overfill.kv.cache import KvCache, copy_sequence
from overfill.kv.codecs import check_scales, encode, quantise, restore
from overfill.kv.int8_cache import Int8KvCache, new_cache
from overfill.kv.native.library import Rows
from overfill.kv.pieces import Piece, digest
from overfill.kv.ranges import KvRange
from overfill.kv.spec import KvSpec, RopeSpec
from overfill.v1 import common_pb2

CPU = torch.device("cpu")
SPEC = KvSpec(3, 2, 8, "bfloat16", RopeSpec())
INT8 = common_pb2.KV_CODEC_INT8
TABLE = [5, 0, 3]


def filled(spec: KvSpec = SPEC) -> KvCache:
    cache = KvCache(spec, 6, 4, CPU)
    cache.k.normal_()
    cache.v.normal_(std=5)
    return cache


def rounded(vectors: torch.Tensor) -> torch.Tensor:
    return restore(*quantise(vectors, INT8), vectors.dtype)


def test_it_takes_half_of_the_bytes_and_the_scales() -> None:
    assert Int8KvCache(SPEC, 6, 4, CPU).token_bytes == 3 * 2 * 2 * (8 + 4)
    assert Int8KvCache(SPEC, 6, 4, CPU).block_bytes == 4 * 3 * 2 * 2 * (8 + 4)
    assert type(new_cache(SPEC, 6, 4, CPU)) is KvCache
    assert type(new_cache(SPEC, 6, 4, CPU, "int8")) is Int8KvCache


def test_new_tokens_come_back_as_the_codec_would_bring_them() -> None:
    cache, slots = Int8KvCache(SPEC, 6, 4, CPU), torch.tensor([9, 2, 23])
    k, v = torch.randn(2, 3, 2, 8).bfloat16()
    cache.put(1, slots, k, v)
    room = (cache.new_room(3), cache.new_room(3))
    for found in (cache.gather(1, slots), cache.gather(1, slots, room)):
        assert torch.equal(found[0], rounded(k))
        assert torch.equal(found[1], rounded(v))
    assert torch.equal(room[0], rounded(k))
    assert not cache.gather(1, torch.tensor([3]))[0].any()
    assert not cache.gather(0, slots)[0].any()


def test_a_sequence_is_copied_from_a_cache_of_any_kind() -> None:
    source, target = filled(), Int8KvCache(SPEC, 6, 4, CPU)
    copy_sequence(source, TABLE, target, [1, 2, 4], [2, 0, 1], 10)
    taken, placed = source.slots(TABLE, 0, 10), target.slots([1, 2, 4], 0, 10)
    for row, layer in enumerate([2, 0, 1]):
        for found, given in zip(target.gather(row, placed), source.gather(layer, taken), strict=True):
            assert torch.equal(found, rounded(given))


@pytest.mark.parametrize("heads", [(0, 2), (1, 2)])
def test_raw_bytes_are_rounded_and_codes_stored_as_they_came(heads: tuple[int, int]) -> None:
    """Payloads of raw KV and of the int8 codec, into the layers that take them, give the same cache."""
    source = filled()
    box = KvRange(0, 2, 1, 10, *heads)
    raw = source.read(TABLE, box.layers, box.tokens, box.heads)
    scales, codes = encode(INT8, "bfloat16", 8, memoryview(bytearray(raw)))
    caches = [Int8KvCache(SPEC, 6, 4, CPU) for _ in range(2)]
    rows = Rows({0: [2], 1: [0, 1]})
    pieces = [Piece(box, raw), Piece(box, codes, scales=scales)]
    for cache, piece in zip(caches, pieces, strict=True):
        assert cache.write_pieces([1, 2, 4], rows, [piece]) == 1
    for name in ("k", "v", "k_scales", "v_scales"):
        assert torch.equal(getattr(caches[0], name), getattr(caches[1], name)), name
    vectors = torch.frombuffer(bytearray(raw), dtype=torch.bfloat16).view(2, 2, 9, heads[1] - heads[0], 8)
    for layer, targets in ((0, [2]), (1, [0, 1])):
        for row in targets:
            found = caches[1].gather(row, caches[1].slots([1, 2, 4], 1, 10))
            for half in (0, 1):
                assert torch.equal(found[half][:, heads[0] : heads[1]], rounded(vectors[half, layer]))
    again = caches[1].read([1, 2, 4], [2], box.tokens, box.heads)
    found = torch.frombuffer(bytearray(again), dtype=torch.bfloat16).view(vectors[:, 0].shape)
    assert torch.equal(found, rounded(vectors[:, 0]))
    out = Piece(KvRange(2, 3, 1, 10, *heads), bytearray(len(again)), b"header")
    caches[1].read_pieces([1, 2, 4], [out], {})
    assert (bytes(out.payload), out.checksum) == (bytes(again), digest(b"header", again))


@pytest.mark.parametrize("flipped", ["payload", "scales"])
def test_a_flipped_bit_of_codes_or_scales_is_noticed(flipped: str) -> None:
    box = KvRange(0, 1, 0, 4, 0, 2)
    raw = filled().read(TABLE, box.layers, box.tokens, box.heads)
    scales, codes = (bytearray(part) for part in encode(INT8, "bfloat16", 8, memoryview(bytearray(raw))))
    checksum = digest(b"h", scales, codes)
    whole = Piece(box, bytes(codes), b"h", checksum, bytes(scales))
    (codes if flipped == "payload" else scales)[3] ^= 16
    damaged = Piece(box, codes, b"h", checksum, scales)
    cache = Int8KvCache(SPEC, 6, 4, CPU)
    assert cache.write_pieces([1], Rows({0: [0]}), [whole, damaged]) == 1


def test_scales_must_be_finite() -> None:
    check_scales(torch.tensor([0.0, 1.0]).numpy().tobytes())
    for bad in (float("nan"), float("inf")):
        with pytest.raises(TransferFailed, match="scale"):
            check_scales(torch.tensor([1.0, bad]).numpy().tobytes())

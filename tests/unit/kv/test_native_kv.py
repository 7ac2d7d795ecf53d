"""Tests that native code, numpy and torch copy and hash the same bytes and detect damaged chunks."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from overfill.kv.cache import KvCache
from overfill.kv.chunks import Chunk, digest
from overfill.kv.native import library
from overfill.kv.ranges import KvRange
from overfill.kv.spec import KvSpec, RopeSpec
from overfill.kv.store import LayerTargets
from overfill.kv.tensors import DeviceTensors, NumpyTensors

pytestmark = pytest.mark.skipif(library.load() is None, reason="no native code for KV")


def make_cache(storage=library.NativeTensors, head_dim=8, heads=3, layers=4, blocks=12, block_size=4, dtype="float32"):
    cache = KvCache(KvSpec(layers, heads, head_dim, dtype, RopeSpec()), blocks, block_size, torch.device("cpu"))
    generator = torch.Generator().manual_seed(7)
    cache.k.copy_(torch.randn(cache.k.shape, generator=generator))
    cache.v.copy_(torch.randn(cache.v.shape, generator=generator))
    assert isinstance(cache._elements, library.NativeTensors)
    if storage is not library.NativeTensors:
        cache._elements = storage(cache.k, cache.v)
    return cache


def blank(cache, kv_range, header):
    size = kv_range.num_vectors * cache.spec.head_dim * cache.k.element_size()
    return Chunk(kv_range, bytearray(size), header)


@settings(deadline=None, max_examples=200)
@given(data=st.data())
def test_every_storage_reads_and_writes_the_same_bytes(data):
    head_dim, dtype = data.draw(st.sampled_from([2, 8, 64, 130])), data.draw(st.sampled_from(["float32", "bfloat16"]))
    caches = [
        make_cache(storage, head_dim, dtype=dtype) for storage in (library.NativeTensors, NumpyTensors, DeviceTensors)
    ]
    table = data.draw(st.permutations(range(12)))[:10]

    def span(largest):
        start = data.draw(st.integers(0, largest - 1))
        return start, data.draw(st.integers(start + 1, largest))

    ranges = [KvRange(*span(4), *span(40), *span(3)) for _ in range(data.draw(st.integers(1, 3)))]
    headers = [data.draw(st.binary(max_size=64)) for _ in ranges]
    read = []
    for cache in caches:
        read.append([blank(cache, kv_range, header) for kv_range, header in zip(ranges, headers, strict=True)])
        cache.read(table, read[-1], {})
    assert read[0] == read[1] == read[2]
    # Layer 1 is stored twice, layer 2 nowhere.
    targets = LayerTargets({0: [3], 1: [0, 2], 3: [1]})
    other = data.draw(st.permutations(range(12)))[:10]
    for cache in caches:
        assert cache.write(other, targets, read[0]) == len(ranges)
    for cache in caches[1:]:
        assert torch.equal(caches[0].k, cache.k)
        assert torch.equal(caches[0].v, cache.v)


@pytest.mark.parametrize("size", [*range(1, 70), 180, 181, 240, 241, 963, 964, 965, 1023, 1024, 1025, 5000, 70_001])
def test_checksums_are_those_of_xxhash_at_every_length(size):
    cache = KvCache(KvSpec(1, 1, size, "bfloat16", RopeSpec()), 1, 1, torch.device("cpu"))
    cache.k.view(torch.uint8).random_(256)
    for header in (b"", b"h", bytes(range(60)), bytes(64)):
        chunk = blank(cache, KvRange(0, 1, 0, 1, 0, 1), header)
        cache.read([0], [chunk], {})
        assert chunk.checksum == (digest(header, chunk.payload) if header else 0)


@pytest.mark.parametrize("storage", [library.NativeTensors, NumpyTensors, DeviceTensors])
@pytest.mark.parametrize("at", [0, 1, 100, -1])
@pytest.mark.parametrize("small", [True, False], ids=["short", "long"])
def test_a_flipped_bit_is_noticed_and_chunks_before_it_are_in_place(storage, at, small):
    source, target = make_cache(storage), make_cache(storage)
    target.k.zero_()
    ranges = [KvRange(0, 1, 0, 8, 0, 3), KvRange(1, 2, 0, 1, 0, 2) if small else KvRange(1, 3, 0, 8, 0, 3)]
    ranges.append(KvRange(3, 4, 0, 8, 0, 3))
    chunks = [blank(source, kv_range, bytes(60)) for kv_range in ranges]
    source.read([1, 2], chunks, {})
    chunks[1].payload[at] ^= 4
    assert target.write([1, 2], LayerTargets({layer: [layer] for layer in range(4)}), chunks) == 1
    assert torch.equal(target.k[0, 1:3], source.k[0, 1:3])


@pytest.mark.parametrize(
    "kv_range",
    [KvRange(0, 5, 0, 1, 0, 1), KvRange(0, 1, 0, 9, 0, 1), KvRange(0, 1, 0, 1, 0, 4), KvRange(0, 1, 1, 1, 0, 1)],
    ids=["layers", "tokens", "heads", "empty"],
)
def test_nothing_outside_the_cache_or_the_sequence_is_touched(kv_range):
    cache = make_cache()
    with pytest.raises(IndexError):
        cache.read([0, 1], [blank(cache, kv_range, b"h")], {})
    with pytest.raises(IndexError):
        cache.write([0, 1], LayerTargets({layer: [layer] for layer in range(4)}), [blank(cache, kv_range, b"")])


def test_neither_blocks_nor_layers_outside_the_cache_are_touched():
    cache = make_cache()
    chunk = blank(cache, KvRange(0, 1, 0, 4, 0, 3), b"")
    for table in ([12], [-1]):
        with pytest.raises(IndexError):
            cache.read(table, [chunk], {})
    with pytest.raises(IndexError):
        cache.write([0], LayerTargets({0: [4]}), [chunk])


def test_a_payload_of_another_length_is_refused():
    cache = make_cache()
    with pytest.raises(IndexError, match="does not fit"):
        cache.write([0], LayerTargets({0: [0]}), [Chunk(KvRange(0, 1, 0, 4, 0, 3), bytes(8))])

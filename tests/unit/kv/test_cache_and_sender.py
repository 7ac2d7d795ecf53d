"""Tests that KV is sent as soon as it is computed and written where the decoder reads it."""

import asyncio
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from overfill.errors import TransferFailed
from overfill.kv.cache import KvCache, copy_sequence
from overfill.kv.chunks import Chunk, TransferSpec, check
from overfill.kv.ranges import Coverage, KvRange, share_among_streams
from overfill.kv.sender import KvSender
from overfill.kv.spec import DTYPE_BYTES, KvSpec, RopeSpec
from overfill.kv.store import LayerTargets
from overfill.kv.wire import parse_message
from overfill.rpc.constants import MAX_CHUNK_PAYLOAD

CPU = torch.device("cpu")


def make_cache(dtype="float32", layers=4, heads=2, blocks=8, block_size=4, head_dim=8, seed=0):
    cache = KvCache(KvSpec(layers, heads, head_dim, dtype, RopeSpec()), blocks, block_size, CPU)
    generator = torch.Generator().manual_seed(seed)
    cache.k.copy_(torch.randn(cache.k.shape, generator=generator))
    cache.v.copy_(torch.randn(cache.v.shape, generator=generator))
    return cache


def read_range(cache, table, kv_range):
    payload = bytearray(kv_range.num_vectors * cache.spec.head_dim * DTYPE_BYTES[cache.spec.dtype])
    cache.read(table, [Chunk(kv_range, payload)], {})
    return payload


@pytest.fixture
def executor():
    with ThreadPoolExecutor(2) as pool:
        yield pool


def test_copy_within_a_process_follows_the_layer_map():
    source, target = make_cache(), make_cache(layers=2, seed=1)
    copy_sequence(source, [4, 1], target, [0, 6], [3, 1], 7)
    taken, placed = source.slots([4, 1], 0, 7), target.slots([0, 6], 0, 7)
    assert torch.equal(target.gather(0, placed)[1], source.gather(3, taken)[1])
    assert torch.equal(target.gather(1, placed)[0], source.gather(1, taken)[0])


def new_sender(cache, executor, tokens=(0, 10), layers=(0, 1, 2, 3)):
    sender = KvSender(TransferSpec(b"x" * 16, 0, cache.spec, layers, tokens), cache, executor)
    sender.begin([5, 0, 3], 0, None)
    return sender


async def chunks_of(sender, ranges):
    async for message in sender.messages(ranges):
        for chunk in parse_message(message):
            yield chunk


async def test_every_stream_together_sends_everything_once(executor):
    cache = make_cache()
    sender = new_sender(cache, executor, tokens=(3, 10), layers=(0, 2, 3))
    coverage = Coverage((0, 2, 3), (3, 10), (0, 2))

    async def pull(ranges):
        async for chunk in chunks_of(sender, ranges):
            kv_range = check(sender.spec, chunk)
            coverage.add(kv_range)
            assert chunk.payload == read_range(cache, [5, 0, 3], kv_range)
            sender.acknowledge(kv_range)

    pulls = [asyncio.ensure_future(pull(r)) for r in share_among_streams((0, 2, 3), (3, 10), (0, 2), 2)]
    for end in (4, 10):  # two chunks of the prompt
        for layer in range(4):
            sender.mark_ready(layer, end, None)
            await asyncio.sleep(0)
    await asyncio.gather(*pulls)
    assert coverage.complete
    assert sender.complete
    assert sender.acknowledged_bytes == sender.ready_bytes == 3 * 7 * cache.spec.token_layer_bytes


async def test_a_layer_leaves_before_the_next_one_is_computed(executor):
    sender = new_sender(make_cache(), executor)
    chunks = sender.messages([KvRange(0, 4, 0, 10, 0, 2)])
    for layer in range(4):
        sender.mark_ready(layer, 10, None)
        (received,) = parse_message(await anext(chunks))
        chunk = received.head
        assert (chunk.range.layer_start, chunk.range.layer_end) == (layer, layer + 1)
    with pytest.raises(StopAsyncIteration):
        await anext(chunks)


async def test_layers_that_wait_together_travel_together(executor):
    sender = new_sender(make_cache(), executor)
    for layer in range(4):
        sender.mark_ready(layer, 10, None)
    sent = [chunk async for chunk in chunks_of(sender, [KvRange(0, 4, 0, 10, 0, 2)])]
    assert len(sent) == 1


def new_large_sender(executor, layers=2):
    """Makes a sender of computed KV; a layer has 1000 tokens of 4 KiB."""
    cache = KvCache(KvSpec(layers, 8, 64, "float32", RopeSpec()), 64, 16, CPU)
    sender = KvSender(TransferSpec(b"x" * 16, 0, cache.spec, tuple(range(layers)), (0, 1000)), cache, executor)
    sender.begin(range(64), 0, None)
    for layer in range(layers):
        sender.mark_ready(layer, 1000, None)
    return sender, cache


async def test_messages_grow_from_one_chunk_on_and_end_with_one(executor):
    sender, _ = new_large_sender(executor, layers=6)  # 24 chunks of 1 MiB
    counts = [len(parse_message(message)) async for message in sender.messages([KvRange(0, 6, 0, 1000, 0, 8)])]
    assert counts[:4] == [1, 1, 2, 4], "the sender reads one message ahead"
    assert max(counts) == 4
    assert counts[-1] == 1
    assert sum(counts) == 24
    assert counts[4:] == sorted(counts[4:], reverse=True)


async def test_no_chunk_exceeds_the_payload_limit(executor):
    sender, cache = new_large_sender(executor)
    sizes = [len(c.payload) async for c in chunks_of(sender, [KvRange(0, 2, 0, 1000, 0, 8)])]
    assert sum(sizes) == 2 * 1000 * cache.spec.token_layer_bytes
    assert max(sizes) <= MAX_CHUNK_PAYLOAD
    assert len(sizes) == 2 * -(-1000 // (MAX_CHUNK_PAYLOAD // cache.spec.token_layer_bytes))


@pytest.mark.parametrize(
    "ranges",
    [
        [KvRange(0, 4, 0, 10, 0, 2)],
        [KvRange(0, 2, 2, 10, 0, 2), KvRange(1, 3, 2, 10, 0, 2)],
    ],
    ids=["outside", "overlapping"],
)
def test_ranges_that_are_not_part_of_the_transfer_or_overlap_are_refused(executor, ranges):
    sender = new_sender(make_cache(), executor, tokens=(2, 10))
    with pytest.raises(TransferFailed):
        sender.check_ranges(ranges)
    sender.check_ranges([KvRange(0, 2, 2, 10, 0, 2), KvRange(2, 4, 2, 10, 0, 2)])


async def test_a_range_is_acknowledged_once(executor):
    sender = new_sender(make_cache(), executor)
    sender.acknowledge(KvRange(0, 1, 0, 10, 0, 2))
    with pytest.raises(TransferFailed, match="overlaps"):
        sender.acknowledge(KvRange(0, 1, 0, 10, 0, 2))


@settings(deadline=None)
@given(data=st.data())
def test_any_range_is_read_and_written_right_between_caches_of_other_block_sizes(data):
    """Compares all elements, for whole and partial blocks and for all or some heads."""
    source, target = (
        make_cache(layers=3, heads=4, blocks=20, block_size=4),
        make_cache(layers=3, heads=4, blocks=30, block_size=8, seed=1),
    )
    before = target.k.clone()
    table = data.draw(st.permutations(range(20)))[:10]
    other = data.draw(st.permutations(range(30)))[:6]
    start = data.draw(st.integers(0, 39))
    tokens = (start, data.draw(st.integers(start + 1, 40)))
    first = data.draw(st.integers(0, 3))
    heads = (first, data.draw(st.integers(first + 1, 4)))
    kv_range = KvRange(0, 3, *tokens, *heads)
    target.write(other, LayerTargets({2: [0], 0: [2, 1]}), [Chunk(kv_range, read_range(source, table, kv_range))])
    taken, placed = source.slots(table, *tokens), target.slots(other, *tokens)
    columns = slice(*heads)
    for row, layer in ((0, 2), (2, 0), (1, 0)):
        for half in (0, 1):
            assert torch.equal(
                target.gather(row, placed)[half][:, columns], source.gather(layer, taken)[half][:, columns]
            )
    untouched = torch.ones(30 * 8, dtype=torch.bool)
    untouched[placed] = False
    flat = before.view(3, 30 * 8, 4, 8)
    for row in range(3):
        assert torch.equal(target.layer(row)[0][untouched], flat[row][untouched])

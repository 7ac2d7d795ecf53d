"""Handoffs between workers whose KV heads are divided among ranks, unequally too, over gRPC.

The prefill worker's service and the receiver are real. Ranks are servers of this process with a share of the heads.
"""

import asyncio
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, aclosing
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from overfill.engine.sequence import (
    ChunkComputed,
    KvWritten,
    Lend,
    Lent,
    PrefillScheduled,
    PromptComputed,
    Release,
    Submit,
)
from overfill.errors import TransferFailed, Unavailable
from overfill.kv import puller as kv_puller
from overfill.kv import stall
from overfill.kv.borrowing import Borrower
from overfill.kv.cache import KvCache
from overfill.kv.chunks import Chunk
from overfill.kv.handshake import KvIdentity
from overfill.kv.keys import PromptBlocks
from overfill.kv.peers import PeerPool
from overfill.kv.puller import DataChannels, LocalPuller
from overfill.kv.ranges import Coverage, KvRange
from overfill.kv.ranks import RankPullers
from overfill.kv.receiver import PromptPull
from overfill.kv.sender import KvSender
from overfill.kv.shm import ShmServer
from overfill.kv.spec import KvSpec, RopeSpec
from overfill.kv.streams import TransferStreams
from overfill.kv.wire import SERVICE, add_prefill_to_server
from overfill.model.steps import SampledToken
from overfill.request.names import CODECS
from overfill.request.params import SamplingParams
from overfill.rpc.constants import WIRE_VERSION
from overfill.rpc.server import RpcServer
from overfill.v1 import common_pb2, decode_pb2, kv_pb2, prefill_pb2, prefill_pb2_grpc, registry_pb2
from services.prefill.servicer import PrefillServicer

KV = KvSpec(num_layers=4, num_kv_heads=6, head_dim=8, dtype="float32", rope=RopeSpec())
ALL = (0, 6)
LAYER_MAP = [0, 1, 3]
NUM_MAPPED = len(LAYER_MAP)
PROMPT = list(range(1, 46))
SENT_FROM, PUT_INTO = [2, 0, 3], [1, 3, 0]  # blocks


class HeadStore:
    """A cache of some heads, whose chunks name the full model's heads."""

    def __init__(self, heads, num_layers):
        self.heads = heads
        spec = replace(KV, num_layers=num_layers, num_kv_heads=heads[1] - heads[0])
        self.cache = KvCache(spec, 4, 16, torch.device("cpu"))
        self.block_size, self.codec = 16, self.cache.codec
        self.writes = 0

    def _own(self, chunk):
        first, end = (head - self.heads[0] for head in chunk.range.heads)
        assert 0 <= first < end <= self.heads[1] - self.heads[0]
        own = chunk.range._replace(head_start=first, head_end=end)
        return Chunk(own, chunk.payload, chunk.header, chunk.checksum, chunk.scales)

    def read(self, block_table, chunks, after):
        own = [*map(self._own, chunks)]
        self.cache.read(block_table, own, after)
        for chunk, read in zip(chunks, own, strict=True):
            chunk.checksum = read.checksum

    def write(self, block_table, targets, chunks):
        self.writes += len(chunks)
        return self.cache.write(block_table, targets, [*map(self._own, chunks)])


class Rank(prefill_pb2_grpc.PrefillServicer):
    """A rank of a prefill worker: serves PullKv of its heads. ``spoil`` may change a stream."""

    def __init__(self, heads, executor):
        self.store = HeadStore(heads, KV.num_layers)
        self.executor = executor
        self.transfers = {}
        self.requested = []
        self.spoil = lambda messages: messages
        self.server = RpcServer()
        self.server.add(add_prefill_to_server, self, SERVICE)

    async def PullKv(self, request, context):
        self.requested += map(KvRange.from_proto, request.ranges)
        _, streams = self.transfers[request.transfer_id]
        async with aclosing(streams.serve(request, ShmServer(enabled=False))) as messages:
            async for message in self.spoil(messages):
                yield message


class PrefillWorker:
    """A prefill worker with ranks, or with all KV in its process if ``shares`` is None. Its engine needs no model."""

    def __init__(self, shares, executor):
        self.ranks = [Rank(heads, executor) for heads in shares or ()]
        self.whole = HeadStore(ALL, KV.num_layers)
        self.releases = 0
        served = SimpleNamespace(
            store=self.whole,
            blocks_of=lambda prompt, namespace: PromptBlocks(prompt, 16, None, namespace),
            kv=KV,
            max_model_len=64,
            config=SimpleNamespace(vocab_size=64, num_layers=KV.num_layers, eos_token_ids=()),
            codecs=tuple(CODECS.values()),
            new_scores=lambda sampling: None,
            prepare_processor=self.no_processor,
            ranks=self if shares else None,
        )
        self.hello = registry_pb2.Hello(worker_id="p", incarnation=7, wire_version=WIRE_VERSION, kv=KV.to_proto())
        self.service = PrefillServicer(served, self.hello, executor, 4, max_loans=4)
        self.service.engine = SimpleNamespace(send=self.handle, load=SimpleNamespace(waiting=0))
        self.service.host = SimpleNamespace(draining=False)
        self.server = RpcServer()
        self.server.add(add_prefill_to_server, self.service, SERVICE)
        self.target = decode_pb2.AssignPrefill(worker_id="p", incarnation=7)

    async def start(self):
        self.target.address = await self.server.start("127.0.0.1:0")
        for rank in self.ranks:
            first, end = rank.store.heads
            address = await rank.server.start("127.0.0.1:0")
            self.target.data_addresses.add(address=address, first_kv_head=first, num_kv_heads=end - first)

    async def stop(self):
        for server in (self.server, *(rank.server for rank in self.ranks)):
            await server.stop()

    async def no_processor(self, *arguments):
        return None

    def handle(self, message):
        """The engine: computes a prompt at once in two chunks, and layer by layer."""
        if isinstance(message, Release):
            assert not any(streams._readers for rank in self.ranks for _, streams in rank.transfers.values())
            self.releases += 1
        elif isinstance(message, Lend):
            lent = Lent(message.id, SENT_FROM[:2], 32, None)
            asyncio.get_running_loop().call_soon(self.service.on_events, [lent])
        elif isinstance(message, Submit):
            asyncio.get_running_loop().call_soon(self.compute, message.sequence)

    def compute(self, sequence):
        id, layers = sequence.id, range(KV.num_layers)
        self.service.on_events([PrefillScheduled(id, SENT_FROM, 0, None, time.monotonic_ns())])
        for start, end in ((0, 16), (16, 45)):
            self.service.on_events([KvWritten(id, layers, end, None), ChunkComputed(id, start, end)])
        self.service.on_events([PromptComputed(id, SampledToken(7), time.monotonic_ns())])

    async def open(self, spec, block_table, cached_tokens):
        for rank in self.ranks:
            sender = KvSender(spec, rank.store, rank.executor)
            sender.begin(block_table, cached_tokens, None)
            for end in (16, 45):
                for layer in range(KV.num_layers):
                    sender.mark_ready(layer, end, None)
            rank.transfers[spec.transfer_id] = sender, TransferStreams(sender, rank.store.heads)

    async def close(self, transfer_id):
        times = []
        for rank in self.ranks:
            if transfer_id in rank.transfers:
                sender, streams = rank.transfers.pop(transfer_id)
                await streams.join()
                times += [time for time in (sender.first_sent_ns, sender.last_sent_ns) if time is not None]
        return min(times, default=0), max(times, default=0)


@pytest.fixture
def executor():
    with ThreadPoolExecutor(2) as threads:
        yield threads


@pytest.fixture
async def workers(executor, monkeypatch):
    """Returns a function that starts a prefill worker and makes decode ranks with these shares of the heads."""
    monkeypatch.setattr(kv_puller, "_STREAM_BYTES", 1)  # two streams to each address
    async with AsyncExitStack() as stack:

        async def start(prefill_shares, decode_shares, num_layers=NUM_MAPPED):
            worker = PrefillWorker(prefill_shares, executor)
            kv = torch.randn(2, KV.num_layers, len(PROMPT), *ALL[1:], KV.head_dim)
            for store in (worker.whole, *(rank.store for rank in worker.ranks)):
                fill(store, kv)
            await worker.start()
            stack.push_async_callback(worker.stop)
            peers = PeerPool(KvIdentity(WIRE_VERSION, "", "", KV), 2, None, shm=False)
            stack.push_async_callback(peers.close)
            stores = [HeadStore(heads, num_layers) for heads in decode_shares or [ALL]]
            pullers = []
            for store in stores:
                channels = DataChannels(2, None)
                stack.push_async_callback(channels.close)
                pullers.append((store.heads, LocalPuller(store, executor, channels, heads=store.heads)))
            ranks = RankPullers(pullers) if decode_shares else None
            return SimpleNamespace(prefill=worker, peers=peers, stores=stores, ranks=ranks, kv=kv, executor=executor)

        yield start


def fill(store, kv):
    slots = store.cache.slots(SENT_FROM, 0, len(PROMPT))
    for layer in range(KV.num_layers):
        for half, of_layer in zip(store.cache.layer(layer), kv[:, layer], strict=True):
            half[slots] = of_layer[:, slice(*store.heads)]


def arrived(workers):
    """Whether each decode rank has its heads of all layers."""
    return all(
        torch.equal(half[store.cache.slots(PUT_INTO, 0, len(PROMPT))], of_layer[:, slice(*store.heads)])
        for store in workers.stores
        for layer, source in enumerate(LAYER_MAP)
        for half, of_layer in zip(store.cache.layer(layer), workers.kv[:, source], strict=True)
    )


async def hand_over(workers, limits=stall.DEFAULT_LIMITS, **start):
    sampling = SamplingParams(temperature=0, max_tokens=start.pop("max_tokens", 9)).to_proto()
    request = prefill_pb2.StartPrefill(
        prompt_token_ids=PROMPT, sampling=sampling, sample_first_token=True, trace=True, **start
    )
    async with workers.peers.use(workers.prefill.target) as peer:
        puller = workers.ranks or LocalPuller(workers.stores[0], workers.executor, peer.data)
        pull = PromptPull(peer, request, KV, LAYER_MAP, puller, PUT_INTO, 64, limits=limits)
        tokens, in_place = [], []
        await pull.run(20.0, tokens.append, lambda: in_place.append(arrived(workers)))
    assert [[*token.ids] for token in tokens] == [[7]]
    return pull.stats, in_place


async def freed(workers):
    async with asyncio.timeout(5):
        while not workers.prefill.releases:
            await asyncio.sleep(0.005)
    assert workers.prefill.service.active == 0


SHARES = {
    1: [ALL],
    2: [(0, 3), (3, 6)],
    3: [(0, 2), (2, 4), (4, 6)],
    "unequal": [(0, 1), (1, 6)],
    "replicas": [(0, 3), (0, 3), (3, 6), (3, 6)],
    None: None,  # no ranks
}


@pytest.mark.parametrize("codec", [common_pb2.KV_CODEC_RAW, common_pb2.KV_CODEC_INT8], ids=["raw", "int8"])
@pytest.mark.parametrize(
    ("sends", "receives"),
    [(2, 3), (3, 2), (2, None), (None, 2), (1, "replicas"), (3, "unequal"), ("unequal", "replicas"), (None, None)],
)
async def test_heads_arrive_where_they_belong(workers, monkeypatch, sends, receives, codec):
    workers = await workers(SHARES[sends], SHARES[receives])
    acknowledged = Coverage((0, 1, 3), (0, 45), ALL)
    acknowledge = KvSender.acknowledge
    monkeypatch.setattr(KvSender, "acknowledge", lambda *a: acknowledged.add(a[1]) or acknowledge(*a))
    if codec == common_pb2.KV_CODEC_INT8:  # codes and scales of these values are exact
        workers.kv.fill_(127.0)
        for store in (workers.prefill.whole, *(rank.store for rank in workers.prefill.ranks)):
            fill(store, workers.kv)
    stats, in_place = await hand_over(workers, codec=codec)
    assert in_place == [True], "the answer goes on once, and when every rank has its heads"
    assert acknowledged.complete or (sends, receives) == (None, None), "little KV of one process comes at once"
    token_bytes = KV.token_layer_bytes * 3 if codec == common_pb2.KV_CODEC_RAW else 2 * 3 * 6 * (8 + 4)
    replicas = 2 if receives == "replicas" else 1
    assert (stats.kv_bytes, stats.broken_streams) == (replicas * len(PROMPT) * token_bytes, 0)
    assert 0 < stats.first_kv_ns <= stats.last_kv_ns
    assert stats.prefill.first_kv_sent_ns <= stats.prefill.last_kv_sent_ns
    for rank in workers.prefill.ranks:
        assert rank.requested
    await freed(workers)


async def test_an_answer_of_one_token_needs_nothing_of_the_ranks(workers):
    workers = await workers(SHARES[2], SHARES[2])
    stats, in_place = await hand_over(workers, max_tokens=1)
    assert (stats.kv_bytes, in_place) == (0, [])
    assert not any(rank.requested for rank in workers.prefill.ranks)
    await freed(workers)


def hang(messages):
    async def spoiled():
        async for message in messages:
            yield message
            await asyncio.Event().wait()

    return spoiled()


async def test_a_rank_that_stops_sending_fails_the_handoff_and_both_sides_are_free(workers, monkeypatch):
    monkeypatch.setattr(stall, "_INTERVAL", 0.01)
    workers = await workers(SHARES[2], SHARES[3])
    workers.prefill.ranks[1].spoil = hang
    with pytest.raises(TransferFailed, match=r"of 51840 ready bytes moved: no byte has moved for 0.2 s"):
        await hand_over(workers, stall.TransferLimits(stall=0.2))
    writes = [store.writes for store in workers.stores]
    await freed(workers)
    assert [store.writes for store in workers.stores] == writes


async def test_a_rank_that_dies_fails_the_handoff_and_both_sides_are_free(workers, monkeypatch):
    monkeypatch.setattr(kv_puller, "_REPEAT_DELAY", 0.0)
    workers = await workers(SHARES[3], SHARES[2])
    dying, ends = workers.prefill.ranks[2], []

    async def die(messages):
        async for message in messages:
            yield message
            ends.append(asyncio.ensure_future(dying.server.stop()))
            await asyncio.Event().wait()

    dying.spoil = die
    with pytest.raises(Unavailable):
        await hand_over(workers)
    await freed(workers)


async def test_an_address_that_accepts_and_says_nothing_fails_the_handoff_in_bounded_time(workers, monkeypatch):
    monkeypatch.setattr("overfill.rpc.channel.CONNECT_TIMEOUT", 0.2)
    workers = await workers(SHARES[2], SHARES[3])
    with socket.create_server(("127.0.0.1", 0)) as silent:
        workers.prefill.target.data_addresses[1].address = f"127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(Unavailable):
            await hand_over(workers)
    await freed(workers)


async def test_a_stream_that_ends_early_is_pulled_again_from_its_own_address(workers):
    workers = await workers(SHARES[3], SHARES[2])
    broken = workers.prefill.ranks[1]

    def break_once(messages):
        broken.spoil = lambda messages: messages
        return cut(messages)

    async def cut(messages):
        async for message in messages:
            yield message
            raise Unavailable("the connection is gone")

    broken.spoil = break_once
    stats, in_place = await hand_over(workers)
    assert in_place == [True]
    assert stats.broken_streams == 1
    await freed(workers)


async def test_heads_that_an_address_does_not_serve_fail_the_handoff(workers):
    workers = await workers(SHARES[2], SHARES[2])
    first, second = workers.prefill.target.data_addresses
    first.num_kv_heads, second.first_kv_head, second.num_kv_heads = 4, 4, 2
    with pytest.raises(TransferFailed, match="this address serves the KV heads 0:3 only"):
        await hand_over(workers)
    await freed(workers)


async def test_a_cancelled_handoff_ends_in_every_rank(workers):
    workers = await workers(SHARES[2], SHARES[3])
    for rank in workers.prefill.ranks:
        rank.spoil = hang
    running = asyncio.ensure_future(hand_over(workers))
    async with asyncio.timeout(5):
        while not all(store.writes for store in workers.stores):
            await asyncio.sleep(0.005)
    running.cancel()
    await asyncio.wait([running])
    writes = [store.writes for store in workers.stores]
    await freed(workers)
    assert [store.writes for store in workers.stores] == writes


async def borrow(workers):
    """Borrows the prompt as a prefill worker with the receiving stores would. Returns the tokens in place."""
    target, store = workers.prefill.target, workers.stores[0]

    def new_puller(peer):
        return workers.ranks or LocalPuller(store, workers.executor, peer.data)

    holder = kv_pb2.KvHolder(
        worker_id="p", incarnation=7, address=target.address, data_addresses=target.data_addresses, tokens=32
    )
    start = prefill_pb2.StartLend(prompt_token_ids=PROMPT)
    return await Borrower(workers.peers, KV, 16, new_puller).borrow(holder, start, PUT_INTO)


@pytest.mark.parametrize(("lends", "borrows"), [(2, 3), ("unequal", None), (None, "replicas"), (None, None)])
async def test_loans_move_between_workers_with_different_ranks(workers, lends, borrows):
    workers = await workers(SHARES[lends], SHARES[borrows], KV.num_layers)
    assert await borrow(workers) == 32
    for store in workers.stores:
        slots = store.cache.slots(PUT_INTO, 0, len(PROMPT))
        for layer in range(KV.num_layers):
            for half, of_layer in zip(store.cache.layer(layer), workers.kv[:, layer], strict=True):
                assert torch.equal(half[slots[:32]], of_layer[:32, slice(*store.heads)])
                assert not half[slots[32:]].any(), "nothing else is written"
    await freed(workers)


async def test_a_rank_of_the_holder_that_dies_ends_the_loan_and_nothing_is_written_afterwards(workers, monkeypatch):
    monkeypatch.setattr(kv_puller, "_REPEAT_DELAY", 0.0)
    workers = await workers(SHARES[3], SHARES[2], KV.num_layers)

    async def die(messages):
        async for _ in messages:
            raise Unavailable("the rank has gone")
        yield b""

    workers.prefill.ranks[2].spoil = die
    workers.prefill.ranks[0].spoil = hang
    with pytest.raises((Unavailable, TransferFailed)):
        await borrow(workers)
    writes = [store.writes for store in workers.stores]
    await freed(workers)
    assert [store.writes for store in workers.stores] == writes

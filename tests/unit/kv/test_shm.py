"""Tests KV through shared memory: the same bytes arrive, none are overwritten, and no memory is left behind."""

import asyncio
import errno
import os
import socket
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from overfill.errors import TransferFailed, Unavailable
from overfill.kv import shm
from overfill.kv.cache import KvCache
from overfill.kv.chunks import TransferSpec
from overfill.kv.handshake import KvIdentity
from overfill.kv.peers import PrefillPeer
from overfill.kv.puller import LocalPuller
from overfill.kv.ranges import KvRange
from overfill.kv.receiver import PromptPull
from overfill.kv.sender import KvSender
from overfill.kv.shm import SLOTS, ShmClient, ShmLink, ShmServer
from overfill.kv.spec import KvSpec, RopeSpec
from overfill.kv.wire import SERVICE, add_prefill_to_server
from overfill.request.params import SamplingParams
from overfill.rpc.constants import MAX_SHARED_PAYLOAD, WIRE_VERSION
from overfill.rpc.server import RpcServer
from overfill.v1 import common_pb2, decode_pb2, kv_pb2, prefill_pb2, prefill_pb2_grpc

pytestmark = pytest.mark.skipif(not shm.SUPPORTED, reason="needs Linux")

KV = KvSpec(3, 2, 8, "float32", RopeSpec())
TOKENS = 45


class Prefill(prefill_pb2_grpc.PrefillServicer):
    """Sends the KV of one prompt from its cache. ``spoil`` may change a chunk or its shared memory."""

    def __init__(self):
        self.shm_server = ShmServer()
        self.cache = KvCache(KV, 4, 16, torch.device("cpu"))
        self.cache.k.normal_()
        self.cache.v.normal_()
        self.executor = ThreadPoolExecutor(2)
        self.senders = {}
        self.pulls = []
        self.spoil = lambda message: message

    async def Describe(self, request, context):
        return prefill_pb2.DescribePrefillResponse(
            wire_version=WIRE_VERSION,
            kv=KV.to_proto(),
            codecs=[common_pb2.KV_CODEC_RAW],
            shm=self.shm_server.offer,
        )

    async def Prefill(self, request_iterator, context):
        start = (await anext(aiter(request_iterator))).start
        spec = TransferSpec(start.transfer_id, start.attempt, KV, tuple(start.layers), (0, TOKENS))
        sender = self.senders[start.transfer_id] = KvSender(spec, self.cache, self.executor)
        sender.begin([2, 0, 3], TOKENS, None)
        yield prefill_pb2.PrefillResponse(scheduled=prefill_pb2.PrefillScheduled())
        async for request in request_iterator:
            for box in request.ack.ranges:
                sender.acknowledge(KvRange.from_proto(box))
            if sender.complete:
                break
        yield prefill_pb2.PrefillResponse(done=prefill_pb2.PrefillDone())

    async def PullKv(self, request, context):
        self.pulls.append(request)
        slots = self.shm_server.link(request.link_id).stream(request.stream) if request.link_id else None
        try:
            ranges = [KvRange.from_proto(box) for box in request.ranges]
            async for chunk in self.senders[request.transfer_id].messages(ranges, slots):
                yield self.spoil(chunk)
        finally:
            if slots is not None:
                slots.writes_finished()


@pytest.fixture
async def worker(monkeypatch):
    monkeypatch.setattr("overfill.kv.receiver.MAX_KV_AT_ONCE", 0)  # all KV is pulled
    monkeypatch.setattr("overfill.kv.puller._STREAM_BYTES", 1)  # by all streams
    servicer = Prefill()
    servicer.shm_server.start()
    server = RpcServer()
    server.add(add_prefill_to_server, servicer, SERVICE)
    servicer.address = await server.start("127.0.0.1:0")
    yield servicer
    await server.stop()
    await servicer.shm_server.stop()
    servicer.executor.shutdown()


@pytest.fixture
async def connect(worker):
    peers = []

    async def new_peer(shm=True):
        target = decode_pb2.AssignPrefill(worker_id="p", address=worker.address)
        peers.append(PrefillPeer(target, 2, None, shm))
        await peers[-1].handshake(KvIdentity(WIRE_VERSION, "", "", KV))
        return peers[-1]

    yield new_peer
    for peer in peers:
        await peer.close()


async def pull(peer):
    cache = KvCache(KV, 4, 16, torch.device("cpu"))
    request = prefill_pb2.StartPrefill(
        request_id="r", prompt_token_ids=[0] * TOKENS, sampling=SamplingParams(temperature=0).to_proto()
    )
    with ThreadPoolExecutor(2) as executor:
        puller = LocalPuller(cache, executor, peer.data, peer.link)
        handoff = PromptPull(peer, request, KV, range(3), puller, [1, 3, 0], 1)
        await handoff.run(10.0, lambda token: None)
    return cache, handoff.stats


def arrived(worker, cache):
    taken, placed = worker.cache.slots([2, 0, 3], 0, TOKENS), cache.slots([1, 3, 0], 0, TOKENS)
    return all(
        torch.equal(ours[placed], theirs[taken])
        for layer in range(3)
        for ours, theirs in zip(cache.layer(layer), worker.cache.layer(layer), strict=True)
    )


def the_link(worker):
    (link,) = worker.shm_server._links.values()
    return link


async def until(condition):
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.005)


async def test_peers_on_one_host_share_memory_by_themselves(worker, connect):
    peer = await connect()
    for _ in range(3 * SLOTS):
        cache, stats = await pull(peer)
        assert arrived(worker, cache)
        assert stats.shared_bytes == stats.kv_bytes == TOKENS * KV.token_bytes
    await until(lambda: len(the_link(worker).free) == SLOTS)


async def test_either_end_may_decline(worker, connect, monkeypatch):
    peer = await connect(shm=False)
    cache, stats = await pull(peer)
    assert arrived(worker, cache)
    assert stats.shared_bytes == 0
    worker.shm_server.offer = None
    assert (await connect()).link is None
    assert ShmServer(enabled=False).offer is None


async def test_a_wrong_payload_in_shared_memory_is_noticed_and_travels_instead(worker, connect):
    peer = await connect()
    spoiled = []

    def spoil(message):
        chunk = kv_pb2.KvChunk.FromString(message)
        if chunk.HasField("shared") and not spoiled:
            spoiled.append(chunk)
            the_link(worker).memory[chunk.shared.slot * MAX_SHARED_PAYLOAD] ^= 1
        return message

    worker.spoil = spoil
    cache, stats = await pull(peer)
    assert spoiled
    assert stats.broken_streams == 1
    assert arrived(worker, cache)
    assert worker.pulls[-1].link_id == b""
    await until(lambda: len(the_link(worker).free) == SLOTS)


@pytest.mark.parametrize("shared", [{"slot": SLOTS, "length": 4}, {"slot": 0, "length": MAX_SHARED_PAYLOAD + 1}])
async def test_memory_outside_the_segment_is_never_read(worker, connect, shared):
    peer = await connect()
    with pytest.raises(TransferFailed):
        peer.link.payload(kv_pb2.SharedPayload(**shared))


async def test_when_no_memory_can_be_set_aside_payloads_travel(worker, connect, monkeypatch, caplog):
    def full(descriptor, size):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "ftruncate", full)
    peer = await connect()
    assert peer.link is None
    cache, stats = await pull(peer)
    assert arrived(worker, cache)
    assert stats.shared_bytes == 0
    assert "cannot share memory with a decode worker, so payloads travel: [Errno 28]" in caplog.text


async def test_a_link_that_only_the_server_has_lost_makes_payloads_travel(worker, connect):
    peer = await connect()
    worker.shm_server._links.clear()  # before the socket reports it
    cache, stats = await pull(peer)
    assert arrived(worker, cache)
    assert stats.shared_bytes == 0
    assert stats.broken_streams == 2
    worker.shm_server._links[b""] = ShmLink()  # the end of the socket removes this entry
    peer.link.close()


async def test_a_client_that_disconnects_frees_its_slots(worker, connect):
    peer = await connect()
    link = the_link(worker)
    stream = link.stream(99)
    slots = [await stream.acquire() for _ in range(SLOTS)]
    waiting = asyncio.ensure_future(stream.acquire())
    await asyncio.sleep(0)
    assert not waiting.done()
    peer.link.close()
    with pytest.raises(Unavailable):
        await waiting
    slots[0].memory[:] = bytes(len(slots[0].memory))  # a payload still in transit does no harm
    await until(lambda: not worker.shm_server._links)
    with pytest.raises(Unavailable):
        worker.shm_server.link(link.id)


async def test_slots_of_a_stream_come_back_when_both_ends_are_done_with_them():
    link = ShmLink()
    os.close(link.descriptor)
    stream = link.stream(1)
    await stream.acquire()
    link.returned(1, 1)
    assert len(link.free) == SLOTS - 1  # the server may still be writing
    stream.writes_finished()
    assert len(link.free) == SLOTS
    other = link.stream(2)
    slot = await other.acquire()
    other.writes_finished()
    assert len(link.free) == SLOTS - 1  # the client may still be reading
    link.returned(0, slot.number)
    assert len(link.free) == SLOTS
    link.returned(1, 3)  # the stream's end arrived first
    with pytest.raises(Unavailable):
        link.stream(3)
    with pytest.raises(ValueError, match="does not hold"):
        link.returned(0, slot.number)


async def test_without_the_token_nothing_is_shared(worker):
    stranger = prefill_pb2.ShmOffer(name=worker.shm_server.offer.name, token=bytes(16))
    with pytest.raises(ValueError, match="closed the link"):
        await ShmClient.connect(stranger)
    assert not worker.shm_server._links


async def test_a_silent_stranger_delays_no_other_client(worker, connect):
    with socket.socket(socket.AF_UNIX) as silent:
        silent.connect(f"\0{worker.shm_server.offer.name}")
        peer = await connect()
        assert arrived(worker, (await pull(peer))[0])
        assert len(worker.shm_server._links) == 1


async def test_the_server_recovers_from_a_lack_of_file_descriptors(worker, connect, monkeypatch, caplog):
    loop = asyncio.get_running_loop()
    accept, failures = loop.sock_accept, [OSError(errno.EMFILE, "Too many open files")]

    async def scarce(listener):
        if failures:
            raise failures.pop()
        return await accept(listener)

    monkeypatch.setattr(loop, "sock_accept", scarce)
    (await connect()).link.close()  # uses the accept that was already pending
    assert (await connect()).link is not None
    assert not failures
    assert "the decode worker waits" in caplog.text


async def test_the_client_cannot_write(worker, connect):
    peer = await connect()
    with pytest.raises(TypeError):
        peer.link.payload(kv_pb2.SharedPayload(slot=0, length=4))[0] = 1


async def test_shared_memory_has_no_name_in_the_file_system(worker, connect):
    before = set(os.listdir("/dev/shm"))
    await connect()
    assert set(os.listdir("/dev/shm")) == before

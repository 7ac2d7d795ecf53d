"""Tests wrong KV from a prefill worker: the attempt fails with a reason, and no block is written to afterwards.

The receiver under test pulls from a scripted prefill worker over gRPC.
"""

import asyncio
import dataclasses
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from kv_checksums import checksum, seal

from overfill import __version__
from overfill.errors import Incompatible, TransferFailed, Unavailable
from overfill.kv import receiver
from overfill.kv.cache import KvCache
from overfill.kv.chunks import TransferSpec
from overfill.kv.codecs import encode
from overfill.kv.handshake import KvIdentity
from overfill.kv.peers import PeerPool
from overfill.kv.puller import MAX_REPEATS, LocalPuller
from overfill.kv.ranges import KvRange
from overfill.kv.receiver import PromptPull
from overfill.kv.spec import KvSpec, RopeSpec
from overfill.kv.wire import join_chunks
from overfill.request.params import SamplingParams
from overfill.rpc.constants import WIRE_VERSION
from overfill.rpc.server import RpcServer
from overfill.v1 import common_pb2, decode_pb2, kv_pb2, prefill_pb2, prefill_pb2_grpc

KV = KvSpec(num_layers=2, num_kv_heads=2, head_dim=4, dtype="float32", rope=RopeSpec())
IDENTITY = KvIdentity(WIRE_VERSION, "full", "tokenizer", KV)
PROMPT = [1, 2, 3, 4, 5, 6]


class ScriptedPrefill(prefill_pb2_grpc.PrefillServicer):
    """Sends correct KV (all ones); ``spoil`` may change the list of chunks."""

    def __init__(self):
        self.identity = IDENTITY
        self.incarnation = 7
        self.spoil = lambda chunks: chunks
        self.spoiled_pulls = 1_000
        self.pulls = 0
        self.silent = False
        self.hold_done = False
        self.received = []  # kinds of messages after the first
        self.leave_after_acks = False
        self.kv_dtype = None
        self.sends_first_token = True
        self.first_token = decode_pb2.Tokens(ids=[9])
        self.kv = b""  # PrefillAtOnce sends it instead of KV
        self.ended = asyncio.Event()
        self.acknowledged = 0
        self.specs = {}

    async def Describe(self, request, context):
        kv = self.identity.kv.to_proto()
        kv.dtype = self.kv_dtype or kv.dtype
        return prefill_pb2.DescribePrefillResponse(
            wire_version=self.identity.wire_version,
            software_version=__version__,
            worker_id="scripted",
            incarnation=self.incarnation,
            model=common_pb2.ModelIdentity(
                full_digest=self.identity.full_digest, tokenizer_digest=self.identity.tokenizer_digest
            ),
            kv=kv,
            codecs=[common_pb2.KV_CODEC_RAW, common_pb2.KV_CODEC_INT8],
        )

    async def Prefill(self, request_iterator, context):
        try:
            start = (await anext(aiter(request_iterator))).start
            self._begin(start)
            if self.silent:
                await asyncio.Event().wait()
            yield prefill_pb2.PrefillResponse(scheduled=prefill_pb2.PrefillScheduled(queue_ns=1))
            yield prefill_pb2.PrefillResponse(ready=prefill_pb2.RangesReady(token_start=0, token_end=6))
            if self.sends_first_token:
                yield prefill_pb2.PrefillResponse(first_token=self.first_token)
            num_vectors = 2 * 2 * 6 * 2
            async for request in request_iterator:
                self.received.append(request.WhichOneof("message"))
                self.acknowledged += sum(KvRange.from_proto(r).num_vectors for r in request.ack.ranges)
                if self.acknowledged == num_vectors:
                    break
            if self.hold_done:
                await asyncio.Event().wait()
            if self.leave_after_acks:
                raise Unavailable("leaving")
            yield prefill_pb2.PrefillResponse(done=prefill_pb2.PrefillDone())
        finally:
            self.ended.set()

    async def PrefillAtOnce(self, request, context):
        self._begin(request)
        message = kv_pb2.KvChunk()
        first, *others = self._chunks(request.transfer_id, [kv_pb2.KvRange(layer_end=2, token_end=6, head_end=2)])
        message.CopyFrom(first)
        message.also.extend(others)
        first_token = self.first_token if request.sample_first_token and self.sends_first_token else None
        # A repeat finds the prompt in the prefix cache.
        scheduled = prefill_pb2.PrefillScheduled(cached_tokens=0 if request.sample_first_token else 6)
        kv = self.kv or message.SerializeToString()
        return prefill_pb2.PrefillResponse(scheduled=scheduled, first_token=first_token, kv=kv)

    async def PullKv(self, request, context):
        for chunk in self._chunks(request.transfer_id, request.ranges):
            yield chunk

    def _begin(self, start):
        tokens = (0, len(start.prompt_token_ids))
        self.specs[start.transfer_id] = TransferSpec(
            start.transfer_id, start.attempt, KV, tuple(start.layers), tokens, start.codec
        )

    def _chunks(self, transfer_id, ranges):
        spec = self.specs[transfer_id]
        chunks = []
        for box in map(KvRange.from_proto, ranges):
            for start in range(box.token_start, box.token_end, 3):
                piece = box._replace(token_start=start, token_end=min(start + 3, box.token_end))
                scales, payload = b"", torch.ones(spec.raw_bytes(piece) // 4).numpy().tobytes()
                if spec.codec != common_pb2.KV_CODEC_RAW:
                    scales, payload = encode("float32", 4, memoryview(bytearray(payload)))
                chunks.append(kv_pb2.KvChunk.FromString(join_chunks([seal(spec, piece, payload, scales)])))
        self.pulls += 1
        return self.spoil(chunks) if self.pulls <= self.spoiled_pulls else chunks


@pytest.fixture
async def worker(monkeypatch):
    monkeypatch.setattr(receiver, "MAX_KV_AT_ONCE", 0)  # all KV is pulled
    monkeypatch.setattr("overfill.kv.puller._STREAM_BYTES", 1)  # by all streams
    servicer = ScriptedPrefill()
    server = RpcServer()
    server.add(prefill_pb2_grpc.add_PrefillServicer_to_server, servicer, "overfill.v1.Prefill")
    servicer.address = await server.start("127.0.0.1:0")
    yield servicer
    await server.stop()


@pytest.fixture(params=["pulled", "at once"])
def way(request, worker, monkeypatch):
    """How the KV arrives."""
    if request.param == "at once":
        monkeypatch.setattr(receiver, "MAX_KV_AT_ONCE", 6 * KV.token_bytes)
    return request.param


@pytest.fixture
async def pull(worker):
    """Returns a function that runs one handoff and returns the written cache and the first token."""
    pool = PeerPool(IDENTITY, streams=2, tls=None)
    with ThreadPoolExecutor(2) as executor:

        async def run(timeout=10.0, held="auto", codec=common_pb2.KV_CODEC_RAW):
            cache = KvCache(KV, 4, 4, torch.device("cpu"), held)
            tokens = []
            sampling = SamplingParams(temperature=0).to_proto()
            request = prefill_pb2.StartPrefill(
                request_id="r",
                attempt=3,
                prompt_token_ids=PROMPT,
                sampling=sampling,
                sample_first_token=True,
                codec=codec,
            )
            target = decode_pb2.AssignPrefill(worker_id="scripted", incarnation=7, address=worker.address)
            async with pool.use(target) as peer:
                handoff = run.handoff = PromptPull(
                    peer, request, KV, [0, 1], LocalPuller(cache, executor, peer.data, peer.link), [2, 0], 10
                )
                await handoff.run(timeout, tokens.append)
                run.stats = handoff.stats
            return cache, tokens

        yield run
    await pool.close()


def resealed(chunk, **fields):
    for name, value in fields.items():
        setattr(chunk, name, value)
    chunk.checksum = checksum(chunk)
    return chunk


def flipped(chunk):
    chunk.payload = bytes([chunk.payload[0] ^ 1]) + chunk.payload[1:]
    return chunk


def moved(chunk):
    chunk.range.token_start += 1
    chunk.range.token_end += 1
    chunk.checksum = checksum(chunk)
    return chunk


BAD = {
    "truncated": (lambda c: [resealed(c[0], payload=c[0].payload[:-4]), *c[1:]], "its shape needs"),
    "bad checksum": (lambda c: [flipped(c[0]), *c[1:]], "checksum"),
    "outside": (lambda c: [moved(c[1])], "outside"),
    "wrong dtype": (lambda c: [resealed(c[0], dtype=common_pb2.DTYPE_BFLOAT16)], "dtype"),
    "wrong attempt": (lambda c: [resealed(c[0], attempt=2)], "attempt"),
    "another transfer": (lambda c: [resealed(c[0], transfer_id=b"\0" * 16)], "another transfer"),
    "missing": (lambda c: c[:-1], r"left out layers \d:\d x tokens 3:6 x heads 0:2"),
}
ONCE = {kind: spoil for kind, (spoil, _) in BAD.items()} | {
    "duplicated": lambda c: [c[0], c[0], *c[1:]],
    "overlapping": lambda c: [c[0], moved(c[0]), *c[1:]],
    "duplicated at the end": lambda c: [*c, c[-1]],
}


@pytest.mark.parametrize("kind", ONCE)
async def test_ranges_of_a_wrong_chunk_are_sent_again(pull, worker, kind, way):
    worker.spoil, worker.spoiled_pulls = ONCE[kind], 1
    cache, _ = await pull()
    used = cache.slots([2, 0], 0, 6)
    for layer in (0, 1):
        for half in cache.layer(layer):
            assert torch.equal(half[used], torch.ones(6, 2, 4))
    assert (pull.stats.broken_streams, pull.stats.cached_tokens) == (1, 0)
    assert worker.acknowledged == (48 if way == "pulled" else 0)


def scaled(chunk, scale):
    chunk.scales = np.full(len(chunk.scales) // 4, scale, np.float32).tobytes()
    return chunk


CODED = {
    "right": lambda c: c,
    "bad codes": lambda c: [flipped(c[0]), *c[1:]],
    "bad scales": lambda c: [scaled(c[0], float("inf")), *c[1:]],
    "sealed with a scale of NaN": lambda c: [resealed(scaled(c[0], float("nan"))), *c[1:]],
    "too few scales": lambda c: [resealed(c[0], scales=c[0].scales[:-4]), *c[1:]],
    "duplicated": lambda c: [c[0], c[0], *c[1:]],
}


@pytest.mark.parametrize("kind", CODED)
@pytest.mark.parametrize("codec", [common_pb2.KV_CODEC_RAW, common_pb2.KV_CODEC_INT8])
async def test_kv_that_is_held_as_int8_is_checked_as_well(pull, worker, codec, kind):
    if codec == common_pb2.KV_CODEC_RAW and "scale" in kind:
        pytest.skip("raw KV has no scales")
    worker.spoil, worker.spoiled_pulls = CODED[kind], 1
    cache, _ = await pull(held="int8", codec=codec)
    for layer in (0, 1):
        for half in cache.gather(layer, cache.slots([2, 0], 0, 6)):
            torch.testing.assert_close(half, torch.ones(6, 2, 4))
    assert cache.k.sum() == 2 * 6 * 2 * 4 * 127  # nothing else is written
    assert pull.stats.broken_streams == (kind != "right")
    assert worker.acknowledged == 48


async def test_a_broken_data_stream_continues_in_another(pull, worker):
    def breaking(chunks):
        yield chunks[0]
        raise Unavailable("the connection is gone")

    worker.spoil, worker.spoiled_pulls = breaking, 2
    cache, _ = await pull()
    assert cache.k.sum() == 2 * 6 * 2 * 4
    assert pull.stats.broken_streams == 2


@pytest.mark.parametrize("kind", BAD)
async def test_kv_that_stays_wrong_fails_the_attempt_and_says_why(pull, worker, kind, way):
    worker.spoil, reason = BAD[kind]
    if way == "at once" and kind == "missing":
        reason = "vectors missing"
    with pytest.raises(TransferFailed, match=reason):
        await pull()
    if way == "pulled":
        await asyncio.wait_for(worker.ended.wait(), 5)  # the worker is notified and may free its blocks
    else:
        assert worker.pulls == 1 + MAX_REPEATS


async def test_a_write_that_fails_fails_the_attempt_even_for_the_last_chunk(pull, worker, monkeypatch):
    write, count = KvCache.write, 0

    def fail_last(*args):
        nonlocal count
        count += len(args[-1])
        if count == 4:
            raise MemoryError("no room")
        return write(*args)

    monkeypatch.setattr(KvCache, "write", fail_last)
    with pytest.raises(MemoryError):
        await pull()


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ({"ids": []}, "a prefill worker sends one, the first"),
        ({"ids": [9, 9]}, "a prefill worker sends one, the first"),
        ({"ids": [9], "first_index": 3}, "a prefill worker sends one, the first"),
        ({"ids": [10]}, "sent the token 10 of 10"),
        ({"ids": [9], "logprobs": [common_pb2.TokenLogprobs()]}, "sent 1 log-probabilities"),
    ],
)
async def test_a_first_token_that_no_honest_worker_sends_fails(pull, worker, wrong, reason, way):
    worker.first_token = decode_pb2.Tokens(**wrong)
    with pytest.raises(TransferFailed, match=reason):
        await pull()


async def test_no_part_of_the_first_tokens_time_is_longer_than_the_whole(pull, worker, way):
    worker.first_token = decode_pb2.Tokens(ids=[9], return_ns=2**64 - 1, prefill_compute_ns=2**64 - 1)
    _, (token,) = await pull()
    assert max(token.return_ns, token.prefill_compute_ns) <= pull.stats.first_token_ns


@pytest.mark.parametrize(
    ("kv", "reason"),
    [
        (b"\x52\x00" * 2000, "more than 1024 parts"),  # empty chunks in `also`
        (b"\x00" * (1 << 18), "bytes; at most"),
        (b"\x00" * (9 << 20), "larger than max"),  # not the user's fault, although gRPC's status says so
    ],
)
async def test_an_answer_that_would_cost_memory_fails_the_attempt(pull, worker, monkeypatch, kv, reason):
    worker.kv = kv
    monkeypatch.setattr(receiver, "MAX_KV_AT_ONCE", 6 * KV.token_bytes)
    with pytest.raises(TransferFailed, match=reason):
        await pull()


async def test_a_transfer_without_the_first_token_fails(pull, worker, way):
    worker.sends_first_token = False
    with pytest.raises(TransferFailed, match="without the first token"):
        await pull()


async def test_a_worker_that_leaves_after_everything_has_come_does_no_harm(pull, worker):
    worker.leave_after_acks = True
    cache, tokens = await pull()
    assert cache.k.sum() == 2 * 6 * 2 * 4
    assert list(tokens[0].ids) == [9]


async def test_a_worker_that_freezes_after_everything_has_come_is_not_waited_for(pull, worker, monkeypatch, caplog):
    monkeypatch.setattr(receiver, "_FAREWELL", 0.05)
    worker.hold_done = True
    async with asyncio.timeout(5):
        cache, tokens = await pull(timeout=60.0)
        await worker.ended.wait()
    assert cache.k.sum() == 2 * 6 * 2 * 4
    assert list(tokens[0].ids) == [9]
    assert "did not end the transfer" in caplog.text


async def test_a_release_is_the_last_message_even_while_chunks_are_written(pull, worker, monkeypatch):
    monkeypatch.setattr(receiver, "_FAREWELL", 0.2)
    monkeypatch.setattr(receiver, "_ACK_DELAY", 0.0)
    write, writing, go_on = KvCache.write, threading.Event(), threading.Event()

    def slowly(*args):
        writing.set()
        go_on.wait(5)
        return write(*args)

    monkeypatch.setattr(KvCache, "write", slowly)
    running = asyncio.ensure_future(pull())
    assert await asyncio.to_thread(writing.wait, 5)
    assert pull.handoff.release()
    go_on.set()
    await running
    assert pull.handoff.stats.kv_chunks > 0
    assert worker.received == ["release"]


async def test_an_unknown_element_type_is_a_difference_not_a_failure(pull, worker):
    worker.kv_dtype = 99
    with pytest.raises(Incompatible) as caught:
        await pull()
    assert caught.value.fields == ("kv.dtype",)
    worker.kv_dtype = None
    await pull()  # the next transfer connects again


async def test_the_deadline_ends_a_transfer_that_waits(pull, worker):
    from overfill.errors import DeadlineExceeded

    worker.silent = True
    with pytest.raises(DeadlineExceeded):
        await pull(timeout=0.3)
    await asyncio.wait_for(worker.ended.wait(), 5)


async def test_cancelling_the_transfer_ends_it_on_the_worker_too(pull, worker):
    worker.silent = True
    task = asyncio.ensure_future(pull())
    while not worker.specs:
        await asyncio.sleep(0.01)
    task.cancel()
    await asyncio.wait([task])
    assert task.cancelled()
    await asyncio.wait_for(worker.ended.wait(), 5)


async def test_another_full_model_is_refused_with_the_differing_fields(pull, worker):
    worker.identity = dataclasses.replace(IDENTITY, full_digest="other", kv=dataclasses.replace(KV, head_dim=8))
    with pytest.raises(Incompatible) as caught:
        await pull()
    assert caught.value.fields == ("full_digest", "kv.head_dim")


async def test_a_restarted_worker_is_not_the_one_that_was_chosen(pull, worker):
    worker.incarnation = 8
    with pytest.raises(Unavailable, match="restarted"):
        await pull()

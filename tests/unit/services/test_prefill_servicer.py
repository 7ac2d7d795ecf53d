"""Tests that a lease ends only when no stream reads its blocks, and that a full worker refuses requests."""

import asyncio
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch

from overfill.engine.sequence import (
    AwaitingImport,
    Imported,
    KvWritten,
    Lent,
    PrefillScheduled,
    PrefillSequence,
    PromptComputed,
    Release,
    Submit,
)
from overfill.errors import Incompatible, InvalidRequest, Overloaded, TransferFailed, Unavailable
from overfill.kv import stall
from overfill.kv.blocks import BlockPool
from overfill.kv.cache import KvCache
from overfill.kv.chunks import check
from overfill.kv.imports import Imports
from overfill.kv.prefix import PrefixCache
from overfill.kv.ranges import KvRange
from overfill.kv.spec import KvSpec, RopeSpec
from overfill.kv.wire import parse_message
from overfill.model.steps import SampledToken
from overfill.request.names import CODECS
from overfill.request.params import SamplingParams
from overfill.v1 import common_pb2, kv_pb2, prefill_pb2, registry_pb2
from services.prefill import servicer as prefill_servicer
from services.prefill.servicer import PrefillServicer

KV = KvSpec(2, 1, 4, "float32", RopeSpec())
PREFIX = PrefixCache(BlockPool(4, 4))


class SlowCache(KvCache):
    """A cache whose reads block until the test lets them continue."""

    def __init__(self):
        super().__init__(KV, 4, 4, torch.device("cpu"))
        self.reading = threading.Event()
        self.go_on = threading.Event()
        self.busy = 0

    def read(self, *args, **kwargs):
        self.busy += 1
        self.reading.set()
        self.go_on.wait(10)
        self.busy -= 1
        return super().read(*args, **kwargs)


@pytest.fixture
async def bench(monkeypatch):
    monkeypatch.setattr("overfill.kv.sender._SHORT", 0)  # threads read, however little
    cache = SlowCache()
    parts = SimpleNamespace(
        store=cache,
        blocks_of=PREFIX.blocks_of,
        kv=KV,
        max_model_len=64,
        config=SimpleNamespace(vocab_size=64, num_layers=2),
        codecs=tuple(CODECS.values()),
        new_scores=lambda sampling: None,
        ranks=None,
    )
    released_while_busy = []

    sent = []

    def send(message):
        sent.append(message)
        if isinstance(message, Release):
            released_while_busy.append(cache.busy)

    with ThreadPoolExecutor(2) as executor:
        servicer = PrefillServicer(parts, registry_pb2.Hello(worker_id="p"), executor, max_leases=2)
        servicer.engine = SimpleNamespace(send=send, load=SimpleNamespace(waiting=0))
        servicer.host = SimpleNamespace(draining=False)
        yield SimpleNamespace(servicer=servicer, cache=cache, releases=released_while_busy, parts=parts, sent=sent)
        cache.go_on.set()


def start(transfer_id=b"t" * 16, **options):
    return prefill_pb2.StartPrefill(
        transfer_id=transfer_id,
        prompt_token_ids=[1, 2, 3, 4],
        layers=[0, 1],
        codec=common_pb2.KV_CODEC_RAW,
        sampling=common_pb2.SamplingParams(temperature=0),
        **options,
    )


def accepted(servicer, transfer_id=b"t" * 16, **options):
    sequence = PrefillSequence(transfer_id.hex(), [1, 2, 3, 4], SamplingParams(temperature=0))
    return servicer._accept(start(transfer_id, **options), sequence)


def computed(servicer):
    lease = accepted(servicer)
    lease.on_event(PrefillScheduled(lease.sequence.id, [0], 0, None, 0))
    for layer in (0, 1):
        lease.on_event(KvWritten(lease.sequence.id, range(layer, layer + 1), 4, None))
    return lease


def pull(servicer, *layers):
    ranges = [kv_pb2.KvRange(layer_start=n, layer_end=n + 1, token_end=4, head_end=1) for n in layers]

    async def run():
        request = prefill_pb2.PullKvRequest(transfer_id=b"t" * 16, ranges=ranges)
        return [chunk async for chunk in servicer.PullKv(request, None)]

    return asyncio.ensure_future(run())


async def until(condition):
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.005)


async def test_streams_that_nobody_reads_are_limited(bench, monkeypatch):
    monkeypatch.setattr("overfill.kv.streams.MAX_DATA_STREAMS", 2)
    computed(bench.servicer)
    readers = [pull(bench.servicer, layer) for layer in (0, 1)]
    await asyncio.to_thread(bench.cache.reading.wait, 5)
    with pytest.raises(TransferFailed, match="has 2 streams"):
        await pull(bench.servicer, 1)
    bench.cache.go_on.set()
    await asyncio.gather(*readers)
    await pull(bench.servicer, 1)


async def test_blocks_are_released_after_the_last_read(bench):
    lease = computed(bench.servicer)
    reader = pull(bench.servicer, 0)
    await asyncio.to_thread(bench.cache.reading.wait, 5)
    reader.cancel()  # as gRPC does when the peer disconnects
    bench.servicer._end(lease)  # which cancels the lease again
    late = pull(bench.servicer, 1)  # a stream that was still connecting
    with pytest.raises(TransferFailed, match="has ended"):
        await late
    assert not bench.releases
    bench.cache.go_on.set()
    await until(lambda: bench.releases)
    assert bench.releases == [0]
    assert bench.servicer.active == 0


@pytest.mark.parametrize("first", [None, SampledToken(7)], ids=["again", "first time"])
async def test_every_computed_prompt_counts_and_only_a_sampled_token_is_sent(bench, first):
    lease = accepted(bench.servicer)
    lease.received_ns = scheduled_ns = time.monotonic_ns() - 2 * 10**9
    lease.on_event(PrefillScheduled(lease.sequence.id, [0], 0, None, scheduled_ns))
    lease.on_event(PromptComputed(lease.sequence.id, first, scheduled_ns + 2 * 10**9))
    lease.sender.acknowledge(KvRange(0, 2, 0, 4, 0, 1))
    responses = [response async for response in bench.servicer._serve(lease, False)]
    parts = [{part.name for part, _ in response.ListFields()} for response in responses]
    assert parts == [{"scheduled"} | ({"first_token"} if first else set())]
    value = bench.servicer._metrics.registry.get_sample_value
    assert value("overfill_prefill_compute_seconds_count") == 1
    assert value("overfill_prefill_compute_seconds_sum") == 2


async def test_the_decode_worker_learns_the_prefill_s_times_where_the_first_token_would_come(bench):
    lease = accepted(bench.servicer, answer_start=3)
    lease.received_ns = scheduled_ns = time.monotonic_ns() - 2 * 10**9
    lease.on_event(PrefillScheduled(lease.sequence.id, [0], 0, None, scheduled_ns))
    lease.on_event(PromptComputed(lease.sequence.id, None, scheduled_ns + 10**9))
    lease.sender.acknowledge(KvRange(0, 2, 0, 4, 0, 1))
    (response,) = [response async for response in bench.servicer._serve(lease, False)]
    first = response.first_token
    assert (list(first.ids), first.prefill_compute_ns) == ([], 10**9)
    assert first.return_ns >= 10**9


def at_once(servicer, **options):
    return asyncio.ensure_future(servicer.PrefillAtOnce(start(**options), None))


def lend_of(servicer, **fields):
    async def requests():
        yield prefill_pb2.LendRequest(start=prefill_pb2.StartLend(**fields))

    return servicer.Lend(requests(), None)


async def compute(servicer):
    """Reports the only prompt as computed."""
    await until(lambda: servicer.active)
    (lease,) = servicer._leases.values()
    lease.received_ns = 0
    lease.on_event(PrefillScheduled(lease.sequence.id, [0], 0, None, 0))
    for layer in (0, 1):
        lease.on_event(KvWritten(lease.sequence.id, range(layer, layer + 1), 4, None))
    lease.on_event(PromptComputed(lease.sequence.id, SampledToken(7), 0))
    return lease


async def test_a_little_kv_comes_at_once_with_the_first_token(bench):
    bench.cache.go_on.set()
    answer = at_once(bench.servicer, trace=True)
    lease = await compute(bench.servicer)
    response = await answer
    assert list(response.first_token.ids) == [7]
    assert response.done.trace.first_token_sent_ns == response.done.trace.last_kv_sent_ns
    (chunk,) = parse_message(response.kv)
    assert check(lease.spec, chunk) == KvRange(0, 2, 0, 4, 0, 1)
    await until(lambda: bench.releases)


async def test_blocks_are_released_after_kv_at_once_has_been_read(bench):
    answer = at_once(bench.servicer)
    await compute(bench.servicer)
    await asyncio.to_thread(bench.cache.reading.wait, 5)
    answer.cancel()
    for _ in range(20):
        await asyncio.sleep(0)
    assert not bench.releases
    bench.cache.go_on.set()
    await until(lambda: bench.releases)
    assert bench.releases == [0]
    assert answer.cancelled()


async def test_late_events_of_a_prompt_that_was_cut_short_are_no_other_prompts(bench):
    """A repeat of a prompt that was computed has the same id, and gets its KV again."""
    bench.cache.go_on.set()
    cut = at_once(bench.servicer)
    await until(lambda: bench.servicer.active)
    cut.cancel()
    await until(lambda: not bench.servicer.active)
    with pytest.raises(InvalidRequest, match="was lately"):
        await asyncio.wait_for(at_once(bench.servicer), 5)
    for _ in range(2):
        answer = at_once(bench.servicer, transfer_id=b"u" * 16)
        await compute(bench.servicer)
        assert (await answer).kv
        await until(lambda: not bench.servicer.active)


async def test_a_lease_and_a_loan_never_have_the_same_id(bench):
    accepted(bench.servicer)
    fields = {"prompt_token_ids": [1, 2, 3], "expected_incarnation": 0}
    bench.servicer._lender._max_loans = 1
    with pytest.raises(InvalidRequest, match="loan or lease"):
        await asyncio.wait_for(anext(lend_of(bench.servicer, transfer_id=b"t" * 16, **fields)), 5)
    loan = asyncio.ensure_future(anext(lend_of(bench.servicer, transfer_id=b"u" * 16, **fields)))
    await until(lambda: bench.servicer._lender.lends(b"u" * 16))
    with pytest.raises(InvalidRequest, match="running transfer"):
        accepted(bench.servicer, b"u" * 16)
    loan.cancel()


async def test_an_answer_of_one_token_gets_no_kv(bench, monkeypatch):
    monkeypatch.setattr(prefill_servicer, "MAX_KV_AT_ONCE", 0)
    answer = at_once(bench.servicer, without_kv=True)
    await compute(bench.servicer)
    response = await answer
    assert list(response.first_token.ids) == [7]
    assert not response.kv
    await until(lambda: bench.releases)


async def test_kv_that_is_too_large_to_come_at_once_is_refused(bench, monkeypatch):
    monkeypatch.setattr(prefill_servicer, "MAX_KV_AT_ONCE", 4 * KV.token_bytes - 1)
    with pytest.raises(InvalidRequest, match=f"{4 * KV.token_bytes} bytes of KV"):
        await at_once(bench.servicer)
    await until(lambda: bench.releases)


async def test_released_kv_does_not_stall(bench, monkeypatch):
    monkeypatch.setattr(stall, "_INTERVAL", 0)
    lease = computed(bench.servicer)
    watching = asyncio.ensure_future(lease.watch_transfer(stall.TransferLimits(stall=0)))
    with pytest.raises(TransferFailed):
        await watching
    lease.released = True
    watching = asyncio.ensure_future(lease.watch_transfer(stall.TransferLimits(stall=0)))
    for _ in range(20):
        await asyncio.sleep(0)
    assert not watching.done()
    watching.cancel()
    bench.servicer._end(lease)
    await until(lambda: bench.releases)


@pytest.mark.parametrize("layers", [(0, 0), (2,)], ids=["overlapping", "outside"])
async def test_ranges_that_make_no_sense_are_the_caller_s_fault(bench, layers):
    bench.cache.go_on.set()
    lease = computed(bench.servicer)
    with pytest.raises(InvalidRequest, match="ranges"):
        await pull(bench.servicer, *layers)
    bench.servicer._end(lease)
    await until(lambda: bench.releases)


async def test_a_full_worker_refuses(bench):
    leases = [accepted(bench.servicer, bytes([n]) * 16) for n in (1, 2)]
    with pytest.raises(Overloaded, match="2 prompts"):
        accepted(bench.servicer, b"3" * 16)
    for lease in leases:
        bench.servicer._end(lease)
    await until(lambda: len(bench.releases) == 2)
    bench.servicer._end(accepted(bench.servicer, b"3" * 16))
    await until(lambda: len(bench.releases) == 3)


class Ranks:
    """Ranks that hold the KV. ``answer`` gates their answers; they fail with ``error`` if it is set."""

    def __init__(self):
        self.calls = []
        self.answer = asyncio.Event()
        self.error = None

    async def open(self, spec, block_table, cached_tokens):
        self.calls.append(("open", spec.transfer_id, [*block_table], cached_tokens))
        await self._end()

    async def close(self, transfer_id):
        self.calls.append(("close", transfer_id))
        await self._end()
        return 1_000, 3_000

    async def _end(self):
        await self.answer.wait()
        if self.error is not None:
            raise self.error


@pytest.fixture
def ranks(bench):
    bench.parts.ranks = Ranks()
    return bench.parts.ranks


async def scheduled_by(servicer):
    await until(lambda: servicer.active)
    (lease,) = servicer._leases.values()
    lease.received_ns = 0
    lease.on_event(PrefillScheduled(lease.sequence.id, [3], 1, None, 500))
    return lease


def begun(servicer, *requests, **options):
    """Begins a Prefill, and returns its responses. The decode worker then sends ``requests``, and no more."""

    async def sent():
        for request in (prefill_pb2.PrefillRequest(start=start(**options)), *requests):
            yield request
        await asyncio.Event().wait()

    return servicer.Prefill(sent(), None)


ACKNOWLEDGED = prefill_pb2.PrefillRequest(
    ack=prefill_pb2.AckKv(ranges=[kv_pb2.KvRange(layer_end=2, token_end=4, head_end=1)])
)


async def test_a_decode_worker_pulls_from_ranks_only_when_all_know_the_transfer(bench, ranks):
    responses = begun(bench.servicer, ACKNOWLEDGED, trace=True)
    first = asyncio.ensure_future(anext(responses))
    lease = await scheduled_by(bench.servicer)
    await until(lambda: ranks.calls)
    assert ranks.calls == [("open", b"t" * 16, [3], 1)]
    assert not first.done(), "the decode worker would pull now"
    ranks.answer.set()
    response = await first
    assert response.scheduled.cached_tokens == 1
    assert lease.sender.ready_bytes == KV.token_bytes
    lease.on_event(KvWritten(lease.sequence.id, range(2), 4, None))
    assert lease.sender.ready_bytes == 4 * KV.token_bytes
    lease.on_event(PromptComputed(lease.sequence.id, SampledToken(7), 2_000))
    rest = [response async for response in responses]
    trace = rest[-1].done.trace
    assert (trace.first_kv_sent_ns, trace.last_kv_sent_ns, len(trace.layer_end_ns)) == (500, 2_500, 0)
    await until(lambda: bench.releases)
    assert ranks.calls[-1] == ("close", b"t" * 16)


async def test_blocks_are_released_after_no_rank_reads_them(bench, ranks):
    responses = begun(bench.servicer)
    first = asyncio.ensure_future(anext(responses))
    await scheduled_by(bench.servicer)
    await until(lambda: ranks.calls)
    first.cancel()  # the decode worker has gone while the ranks learn of the transfer
    await until(lambda: len(ranks.calls) == 2)
    assert ranks.calls[-1] == ("close", b"t" * 16)
    assert not bench.releases
    ranks.answer.set()
    await until(lambda: bench.releases)
    assert bench.servicer.active == 0


async def test_a_rank_that_has_gone_ends_the_prefill_and_its_blocks_stay_in_use(bench, ranks):
    ranks.answer.set()
    ranks.error = Unavailable("rank 1 has gone")
    first = asyncio.ensure_future(anext(begun(bench.servicer)))
    await scheduled_by(bench.servicer)
    with pytest.raises(Unavailable, match="rank 1 has gone"):
        await first
    await until(lambda: not bench.servicer.active)
    assert not bench.releases, "another rank may still read them; the worker ends"


async def test_a_process_without_kv_sends_none(bench, ranks):
    ranks.answer.set()
    with pytest.raises(Incompatible, match="PrefillAtOnce with KV: the ranks of p have its KV") as caught:
        await at_once(bench.servicer)
    assert caught.value.fields == ("data_addresses",)
    with pytest.raises(Incompatible, match="PullKv: the ranks of p have its KV"):
        await pull(bench.servicer, 0)
    answer = at_once(bench.servicer, without_kv=True)
    await compute(bench.servicer)
    assert list((await answer).first_token.ids) == [7]
    await until(lambda: bench.releases)


class Importing:
    """An importer whose import ends when the test says so, or with ``error``."""

    def __init__(self):
        self.requests, self.go_on, self.error = [], asyncio.Event(), None
        self.writing, self.writing_at_release, self.computed = 0, [], []

    def may_import(self, holder, prompt):
        return holder is not None and holder.worker_id == "h"

    def note_computed(self, prompt):
        self.computed.append(prompt)

    async def run(self, request):
        self.requests.append(request)
        self.writing += 1
        try:
            await self.go_on.wait()
            if self.error is not None:
                raise self.error
        finally:
            await asyncio.sleep(0)
            self.writing -= 1
        return Imports(4, peer_tokens=3, disk_tokens=1)


HOLDER = kv_pb2.KvHolder(worker_id="h", incarnation=3, tokens=4)


@pytest.fixture
def importer(bench):
    bench.servicer.importer = Importing()
    send, importer = bench.servicer.engine.send, bench.servicer.importer

    def noting(message):
        if isinstance(message, Release):
            importer.writing_at_release.append(importer.writing)
        send(message)

    bench.servicer.engine.send = noting
    return importer


async def awaiting(bench, **options):
    """Begins a prompt whose import the engine awaits. Returns the first response to come, and the lease."""
    first = asyncio.ensure_future(anext(begun(bench.servicer, holder=HOLDER, **options)))
    await until(lambda: bench.servicer.active)
    (lease,) = bench.servicer._leases.values()
    bench.servicer.on_events([AwaitingImport(lease.sequence.id, [3], 0)])
    await until(lambda: bench.servicer.importer.requests)
    return first, lease


async def test_a_prompt_is_computed_after_what_was_imported_and_the_decode_worker_learns_of_it(bench, importer):
    first, lease = await awaiting(bench, request_id="r", cache_namespace="tenant")
    (submitted,) = bench.sent
    assert submitted.sequence.imports
    (request,) = importer.requests
    assert (request.prompt, request.blocks, request.cached_tokens) == ([1, 2, 3, 4], [3], 0)
    assert (request.request_id, request.holder, request.prompt_blocks.cache_namespace) == ("r", HOLDER, "tenant")
    importer.go_on.set()
    await until(lambda: len(bench.sent) == 2)
    assert bench.sent[-1] == Imported(lease.sequence.id, 4)
    lease.on_event(PrefillScheduled(lease.sequence.id, [3], 4, None, time.monotonic_ns()))
    scheduled = (await first).scheduled
    assert (scheduled.cached_tokens, scheduled.peer_tokens, scheduled.disk_tokens) == (4, 3, 1)


@pytest.mark.parametrize("end", ["cancelled", "fails", "drained"])
async def test_blocks_are_released_after_the_import_has_stopped_writing(bench, importer, end):
    first, _ = await awaiting(bench)
    if end == "cancelled":  # by the client, its deadline, or the loss of the decode worker
        first.cancel()
    elif end == "drained":
        bench.servicer.end_all(Unavailable("leaves"))
    else:
        importer.error = ValueError("a defect")
        importer.go_on.set()
    await asyncio.wait([first])
    await until(lambda: bench.releases)
    assert importer.writing_at_release == [0]
    assert not any(isinstance(message, Imported) for message in bench.sent)
    assert bench.servicer.active == 0


async def test_a_prompt_without_a_holder_waits_for_no_import(bench, importer):
    first = asyncio.ensure_future(anext(begun(bench.servicer)))
    await until(lambda: bench.sent)
    (submitted,) = bench.sent
    assert isinstance(submitted, Submit)
    assert not submitted.sequence.imports
    lease = await scheduled_by(bench.servicer)
    lease.on_event(PromptComputed(lease.sequence.id, SampledToken(7), 2_000))
    await first
    assert importer.computed == [lease.sequence.prompt_blocks], "the disk may keep it"


async def test_a_worker_that_drains_still_lends(bench):
    bench.servicer.host.draining = True
    servicer = PrefillServicer(bench.parts, registry_pb2.Hello(worker_id="p"), None, max_leases=2, max_loans=1)
    servicer.engine, servicer.host = bench.servicer.engine, bench.servicer.host

    async def requests():
        lend = prefill_pb2.StartLend(transfer_id=b"l" * 16, prompt_token_ids=[1, 2, 3, 4])
        yield prefill_pb2.LendRequest(start=lend)

    lent = asyncio.ensure_future(anext(servicer.Lend(requests(), None)))
    await until(lambda: bench.sent)
    servicer.on_events([Lent(bench.sent[0].id, [], 0, None)])
    assert (await lent).tokens == 0

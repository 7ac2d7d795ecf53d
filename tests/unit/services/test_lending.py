"""Tests that a loan is given back after its last reader, however it ends, and whom a worker lends to."""

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from types import SimpleNamespace

import pytest
import torch

from overfill.engine.sequence import Lend, Lent, Release
from overfill.errors import Incompatible, InvalidRequest, Overloaded, PromptTooLong, TransferFailed, Unavailable
from overfill.kv.blocks import BlockPool
from overfill.kv.cache import KvCache
from overfill.kv.chunks import TransferSpec, check
from overfill.kv.keys import codec_namespace
from overfill.kv.prefix import PrefixCache
from overfill.kv.ranks import RankLost
from overfill.kv.shm import ShmServer
from overfill.kv.spec import KvSpec, RopeSpec
from overfill.kv.wire import add_lender_to_server, parse_message
from overfill.telemetry.metrics import DecodeMetrics
from overfill.v1 import kv_pb2, prefill_pb2, registry_pb2
from services import lending
from services.engine_loans import EngineLoans
from services.lending import Lender, LendingServicer

KV = KvSpec(2, 1, 4, "float32", RopeSpec())
PREFIX = PrefixCache(BlockPool(4, 4))
ID = b"t" * 16


class SlowCache(KvCache):
    """A cache whose reads block until the test lets them continue."""

    def __init__(self):
        super().__init__(KV, 4, 4, torch.device("cpu"))
        self.reading, self.go_on, self.busy = threading.Event(), threading.Event(), 0

    def read(self, *args, **kwargs):
        self.busy += 1
        self.reading.set()
        self.go_on.wait(10)
        self.busy -= 1
        return super().read(*args, **kwargs)


class Bench:
    """A lender over a scripted engine, which has ``cached`` tokens of every prompt."""

    def __init__(self, executor, max_loans=2, ranks=None):
        self.cache, self.cached, self.sent, self.busy_at_release = SlowCache(), 8, [], []
        self.answers = True
        self.metrics = DecodeMetrics()
        self.served = SimpleNamespace(
            store=self.cache,
            blocks_of=PREFIX.blocks_of,
            kv=KV,
            max_model_len=64,
            config=SimpleNamespace(vocab_size=64, num_layers=2),
            codecs=(),
            ranks=ranks,
        )
        self.loans = EngineLoans(self.send)
        self.hello = registry_pb2.Hello(worker_id="w", incarnation=7)
        self.shm = ShmServer(enabled=False)
        self.lender = Lender(self.served, self.hello, self.loans, executor, max_loans, self.shm, self.metrics)

    def send(self, message):
        self.sent.append(message)
        if isinstance(message, Release):
            self.busy_at_release.append(self.cache.busy)
        elif self.answers:
            lent = Lent(message.id, [2, 0][: self.cached // 4], self.cached, None)
            asyncio.get_running_loop().call_soon(self.loans.on_event, lent)

    @property
    def released(self):
        return [message.id for message in self.sent if isinstance(message, Release)]

    def pull(self, id=ID):
        ranges = [kv_pb2.KvRange(layer_end=2, token_start=4, token_end=8, head_end=1)]

        async def run():
            request = prefill_pb2.PullKvRequest(transfer_id=id, ranges=ranges)
            return [message async for message in self.lender.pull(request)]

        return asyncio.ensure_future(run())


class Borrower:
    """The other end of one ``Lend``."""

    def __init__(self, bench, **fields):
        defaults = {"transfer_id": ID, "prompt_token_ids": range(1, 10), "expected_incarnation": 7}
        start = prefill_pb2.StartLend(**defaults | {"already_held_tokens": 4} | fields)
        self.requests, self.responses = asyncio.Queue(), asyncio.Queue()
        self.requests.put_nowait(prefill_pb2.LendRequest(start=start))
        self.call = asyncio.ensure_future(self.run(bench.lender))

    async def run(self, lender):
        async def requests():
            while (request := await self.requests.get()) is not None:
                yield request

        async for response in lender.serve(requests()):
            self.responses.put_nowait(response.tokens)

    def end(self):
        self.requests.put_nowait(prefill_pb2.LendRequest(end=prefill_pb2.EndLend()))


@pytest.fixture
def executor():
    with ThreadPoolExecutor(2) as threads:
        yield threads


@pytest.fixture
def bench(executor, monkeypatch):
    monkeypatch.setattr("overfill.kv.sender._SHORT", 0)  # threads read, however little
    bench = Bench(executor)
    yield bench
    bench.cache.go_on.set()


async def test_the_borrower_pulls_what_it_lacks_of_the_cached_prefix(bench):
    bench.cache.go_on.set()
    bench.cache.k.copy_(torch.arange(bench.cache.k.numel()).reshape(bench.cache.k.shape))
    borrower = Borrower(bench)
    assert await borrower.responses.get() == 8
    (message,) = await bench.pull()
    (chunk,) = parse_message(message)
    spec = TransferSpec(ID, 0, KV, (0, 1), (4, 8))
    assert check(spec, chunk).tokens == (4, 8)
    keys = torch.frombuffer(bytearray(chunk.payload), dtype=torch.float32).view(2, 2, 4, 1, 4)[0]
    assert torch.equal(keys, bench.cache.k[:, 0].view(2, 4, 1, 4)), "block 0 holds the tokens from 4 to 8"
    assert not bench.released
    borrower.end()
    await borrower.call
    (lent, _) = bench.sent
    assert isinstance(lent, Lend)
    assert lent.to_peer
    assert bench.released == [lent.id]
    assert bench.metrics.registry.get_sample_value("overfill_decode_lent_tokens_total") == 4
    with pytest.raises(TransferFailed, match="unknown transfer"):
        await bench.pull()


@pytest.mark.parametrize("how", ["cancelled", "half-closed"])
async def test_the_blocks_are_given_back_after_the_last_read(bench, how):
    borrower = Borrower(bench)
    await borrower.responses.get()
    reader = bench.pull()
    assert await asyncio.to_thread(bench.cache.reading.wait, 5)
    if how == "cancelled":  # as gRPC does when the peer is lost
        borrower.call.cancel()
        await asyncio.sleep(0)
        borrower.call.cancel()  # again, while the reader is joined
    else:
        borrower.requests.put_nowait(None)
    await asyncio.sleep(0)
    assert not bench.released
    bench.cache.go_on.set()
    await asyncio.wait([borrower.call, reader])
    assert reader.cancelled()
    assert bench.busy_at_release == [0]


async def test_a_loan_that_the_engine_has_not_answered_is_given_back_too(bench):
    bench.answers = False
    borrower = Borrower(bench)
    while not bench.sent:
        await asyncio.sleep(0)
    borrower.call.cancel()
    await asyncio.wait([borrower.call])
    assert bench.released == [bench.sent[0].id]


async def test_no_borrower_holds_blocks_for_ever(bench, monkeypatch):
    monkeypatch.setattr(lending, "MAX_LOAN_TIME", 0.01)
    borrower = Borrower(bench)
    with pytest.raises(Unavailable, match="at most"):
        await borrower.call
    assert len(bench.released) == 1


async def test_a_borrower_that_does_not_read_the_answer_holds_no_blocks_for_ever(bench, monkeypatch):
    monkeypatch.setattr(lending, "MAX_LOAN_TIME", 0.05)

    async def requests():
        start = prefill_pb2.StartLend(transfer_id=ID, prompt_token_ids=range(1, 10), expected_incarnation=7)
        yield prefill_pb2.LendRequest(start=start)
        await asyncio.Event().wait()

    async def serve():
        async with aclosing(bench.lender.serve(requests())) as answers:
            async for _ in answers:
                await asyncio.Event().wait()  # as gRPC does while the borrower's window is full

    done, _ = await asyncio.wait([asyncio.ensure_future(serve())], timeout=5)
    assert done
    assert len(bench.released) == 1


@pytest.mark.parametrize("cached", [0, 4])
async def test_a_loan_without_a_token_more_ends_by_itself(bench, cached):
    bench.cached = cached
    borrower = Borrower(bench)
    await borrower.call
    assert borrower.responses.get_nowait() == cached
    assert len(bench.released) == 1
    assert bench.metrics.registry.get_sample_value("overfill_decode_lent_tokens_total") == 0


async def test_a_worker_has_a_maximum_of_loans(bench):
    borrowers = [Borrower(bench, transfer_id=id * 16) for id in (b"a", b"b")]
    for borrower in borrowers:
        await borrower.responses.get()
    with pytest.raises(Overloaded, match="2 loans"):
        await Borrower(bench).call
    with pytest.raises(InvalidRequest, match="in use"):
        await Borrower(bench, transfer_id=b"a" * 16).call
    borrowers[0].end()
    await borrowers[0].call
    later = Borrower(bench)
    assert await later.responses.get() == 8
    for borrower in (later, borrowers[1]):
        borrower.end()
        await borrower.call
    assert len(bench.released) == 3


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"expected_incarnation": 6}, Unavailable),
        ({"transfer_id": b"short"}, InvalidRequest),
        ({"prompt_token_ids": []}, InvalidRequest),
        ({"prompt_token_ids": [64]}, InvalidRequest),
        ({"prompt_token_ids": [1] * 65}, PromptTooLong),
        ({"already_held_tokens": 9}, InvalidRequest),
        ({"cache_namespace": codec_namespace("f00", "int8")}, InvalidRequest),
    ],
)
async def test_what_no_honest_borrower_asks_is_refused_before_the_engine_hears_of_it(bench, fields, error):
    with pytest.raises(error):
        await Borrower(bench, **fields).call
    assert not bench.sent


@pytest.mark.parametrize("message", [prefill_pb2.LendRequest(), prefill_pb2.LendRequest(end={})])
async def test_the_first_message_is_the_request(bench, message):
    async def requests():
        yield message

    with pytest.raises(InvalidRequest, match="first message"):
        await anext(bench.lender.serve(requests()))


async def test_only_the_end_follows_the_request(bench):
    borrower = Borrower(bench)
    await borrower.responses.get()
    borrower.requests.put_nowait(prefill_pb2.LendRequest(start=prefill_pb2.StartLend()))
    with pytest.raises(InvalidRequest, match="only EndLend"):
        await borrower.call
    assert len(bench.released) == 1


async def test_a_worker_may_be_told_to_lend_nothing(executor):
    with pytest.raises(Incompatible, match="lends no KV"):
        await Borrower(Bench(executor, max_loans=0)).call


class Ranks:
    """Ranks that hold the KV; ``lost`` is raised at the end of a transfer."""

    def __init__(self, lost=None):
        self.lost, self.opened, self.closed = lost, [], []

    async def open(self, spec, blocks, cached):
        self.opened.append((spec.tokens, blocks, cached))

    async def close(self, transfer_id):
        self.closed.append(transfer_id)
        if self.lost is not None:
            raise self.lost
        return 0, 0


@pytest.mark.parametrize("lost", [None, RankLost("rank 1 has gone")])
async def test_ranks_serve_the_loan_and_blocks_that_one_may_still_read_stay_in_use(executor, lost):
    ranks = Ranks(lost)
    bench = Bench(executor, ranks=ranks)
    borrower = Borrower(bench)
    await borrower.responses.get()
    assert ranks.opened == [((4, 8), [2, 0], 8)]
    with pytest.raises(TransferFailed, match="unknown transfer"):
        await bench.pull()
    borrower.end()
    await borrower.call
    assert ranks.closed == [ID]
    assert len(bench.released) == (lost is None)


async def test_a_decode_worker_that_lends_serves_nothing_else_of_the_prefill_service(bench):
    handlers = []
    server = SimpleNamespace(add_generic_rpc_handlers=handlers.extend)
    servicer = LendingServicer(bench.lender, bench.served, bench.hello, bench.shm)
    add_lender_to_server(servicer, server)
    served = {
        rpc
        for rpc in ("Describe", "Prefill", "PrefillAtOnce", "PullKv", "Lend")
        if handlers[0].service(SimpleNamespace(method=f"/overfill.v1.Prefill/{rpc}"))
    }
    assert served == {"Describe", "PullKv", "Lend"}
    described = await servicer.Describe(prefill_pb2.DescribePrefillRequest(), None)
    assert (described.worker_id, described.incarnation) == ("w", 7)

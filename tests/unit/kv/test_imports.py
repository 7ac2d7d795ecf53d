"""Tests which source an import asks, that it ends in bounded time, and that each failure is a miss."""

import asyncio

import pytest

from overfill.errors import Incompatible, Overloaded, TransferFailed, Unavailable
from overfill.kv import imports
from overfill.kv.imports import Importer, ImportRequest
from overfill.kv.keys import PromptBlocks, root_key
from overfill.kv.ranks import RankLost
from overfill.telemetry.metrics import PrefillMetrics
from overfill.v1 import kv_pb2

BLOCK = 4
PROMPT = list(range(41))  # ten full blocks, and a token


class Bench:
    """An importer with a scripted holder and a scripted disk; ``asked`` has their names in order.

    Attributes:
        lends: tokens that the holder lends; an error that it raises; or a function to await.
        on_disk: number of the prompt's blocks on disk.
        unseen: the last ones of these, which another worker has just written.
        hangs: the disk still owes an answer to an earlier read.
    """

    def __init__(self, disk=True, peers=True):
        self.asked, self.lends, self.on_disk, self.disk_hangs = [], 40, 0, False
        self.hangs, self.unseen = False, 0
        self.token_seconds, self.prompt = 0.0, PromptBlocks(PROMPT, BLOCK, root_key("full", "tenant"), "tenant")
        self.metrics = PrefillMetrics()
        self.importer = Importer(
            ("me", 1),
            BLOCK,
            lambda: self.token_seconds,
            self.borrow if peers else None,
            self if disk else None,
            self.metrics,
        )

    async def borrow(self, holder, start, blocks):
        self.asked.append("peer")
        self.start, self.blocks = start, blocks
        if isinstance(self.lends, Exception):
            raise self.lends
        return self.lends if isinstance(self.lends, int) else await self.lends()

    @property
    def keys(self):
        return {self.prompt.keys[index] for index in range(self.on_disk - self.unseen)}

    def known(self, prompt, begin):
        return max(0, self.on_disk - self.unseen - begin)

    async def read(self, prompt, blocks, begin, end, timeout=None):
        self.asked.append("disk")
        self.read_range = begin, end
        if self.disk_hangs:
            await asyncio.sleep(timeout)
            return 0
        return max(0, min(end, self.on_disk) - begin)

    def save(self, prompt):
        self.asked.append("save")

    async def run(self, cached=0, holder="other", incarnation=1, tokens=40):
        named = kv_pb2.KvHolder(worker_id=holder, incarnation=incarnation, tokens=tokens) if holder else None
        return await self.importer.run(ImportRequest("r", PROMPT, self.prompt, list(range(11)), cached, named))

    def count(self, source, outcome):
        labels = {"source": source, "outcome": outcome}
        return self.metrics.registry.get_sample_value("overfill_prefill_imports_total", labels)

    def tokens(self, source):
        return self.metrics.registry.get_sample_value("overfill_prefill_imported_tokens_total", {"source": source})


async def test_a_prompt_takes_from_the_holder_what_the_cache_lacks():
    bench = Bench()
    done = await bench.run(cached=8)
    assert (done.tokens, done.peer_tokens, done.disk_tokens) == (40, 32, 0)
    assert list(bench.start.prompt_token_ids) == PROMPT
    assert (bench.start.already_held_tokens, bench.start.cache_namespace) == (8, "tenant")
    assert bench.blocks == list(range(11))
    assert (bench.count("peer", "ok"), bench.tokens("peer")) == (1, 32)


@pytest.mark.parametrize(("disk_seconds", "asked", "peer_tokens"), [(0.01, ["disk", "peer"], 20), (1.0, ["peer"], 40)])
async def test_the_cheaper_source_is_asked_first_and_the_other_for_the_rest(disk_seconds, asked, peer_tokens):
    bench = Bench()
    await bench.run()  # measures the holder
    bench.importer._rates["other", 1]._seconds = 0.1 * bench.importer._rates["other", 1]._tokens
    bench.asked.clear()
    bench.on_disk = 5
    bench.importer._of_disk.note(disk_seconds, 1)
    done = await bench.run()
    assert bench.asked == asked
    assert (done.tokens, done.peer_tokens, done.disk_tokens) == (40, peer_tokens, 40 - peer_tokens)


async def test_a_source_that_is_slower_than_computing_is_not_asked_until_its_rate_is_old(monkeypatch):
    bench = Bench()
    bench.token_seconds = 0.001
    await bench.run()
    bench.importer._rates["other", 1].note(100.0, 40)
    bench.asked.clear()
    bench.on_disk = 5
    bench.importer._of_disk.note(0.002, 1)
    assert (await bench.run()).tokens == 0
    assert bench.asked == []
    monkeypatch.setattr(imports, "RATE_LIFETIME", 0.0)
    assert (await bench.run()).tokens == 40
    assert bench.asked == ["disk", "peer"]


async def test_a_few_tokens_are_not_worth_a_loan():
    bench = Bench(disk=False)
    bench.token_seconds = imports.LOAN_OVERHEAD / 20
    await bench.run()
    bench.importer._rates["other", 1].note(1e-6, 40)
    bench.asked.clear()
    assert (await bench.run(cached=24)).tokens == 24
    assert bench.asked == []
    assert (await bench.run(cached=8)).tokens == 40


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (Unavailable("gone"), "unavailable"),
        (Overloaded("full"), "overloaded"),
        (Incompatible("other model", ["x"]), "incompatible"),
        (TransferFailed("a lie"), "transfer_failed"),
        (MemoryError("no room"), "internal"),
    ],
)
async def test_a_holder_that_fails_is_a_miss_and_is_left_alone_for_a_while(monkeypatch, error, outcome):
    bench = Bench()
    bench.on_disk = 3
    bench.importer._of_disk.note(1.0, 1)
    bench.lends = error
    done = await bench.run(cached=4)
    assert (done.tokens, done.peer_tokens, done.disk_tokens) == (12, 0, 8)
    assert bench.count("peer", outcome) == 1
    bench.lends, bench.on_disk = 40, 0
    assert (await bench.run()).tokens == 0
    assert (await bench.run(incarnation=2)).tokens == 40, "the holder has restarted"
    monkeypatch.setattr(imports.time, "monotonic", lambda now=imports.time.monotonic: now() + imports.RETRY_AFTER)
    assert (await bench.run()).tokens == 40


async def test_a_holder_that_has_evicted_the_prompt_has_not_failed():
    bench = Bench()
    bench.lends = 0
    assert (await bench.run(cached=4)).tokens == 4
    assert bench.count("peer", "none") == 1
    bench.lends = 40
    assert (await bench.run(cached=4)).tokens == 40


@pytest.mark.parametrize("holder", ["", "me"])
async def test_without_a_holder_or_with_this_worker_as_the_holder_nothing_is_asked(holder):
    bench = Bench(disk=False)
    named = kv_pb2.KvHolder(worker_id=holder, incarnation=1, tokens=40) if holder else None
    assert not bench.importer.may_import(named, bench.prompt)
    assert (await bench.run(holder=holder)).tokens == 0
    assert bench.asked == []


@pytest.mark.parametrize("disk", [True, False])
def test_the_engine_waits_only_for_a_prompt_of_which_something_may_be_elsewhere(disk):
    bench = Bench(disk)
    other = PromptBlocks(PROMPT, BLOCK, root_key("full", "another"), "another")
    assert not bench.importer.may_import(None, bench.prompt)
    bench.on_disk = 1
    assert [bench.importer.may_import(None, prompt) for prompt in (bench.prompt, other)] == [disk, False]
    assert bench.importer.may_import(kv_pb2.KvHolder(worker_id="h", tokens=40), other)


@pytest.mark.parametrize(("hint", "asked"), [(11, []), (12, ["peer"]), (2**32 - 1, ["peer"])])
async def test_a_holder_is_asked_only_if_it_has_a_block_more(hint, asked):
    bench = Bench(disk=False)
    await bench.run(cached=8, tokens=hint)
    assert bench.asked == asked


@pytest.mark.parametrize("unseen", [2, 5])
async def test_blocks_are_found_that_another_worker_has_just_written(unseen):
    bench = Bench(peers=False)
    bench.on_disk, bench.unseen, bench.token_seconds = 5, unseen, 1.0
    assert (await bench.run()).disk_tokens == 20
    bench.hangs = True
    assert (await bench.run()).disk_tokens == 0


async def test_a_look_at_the_disk_that_finds_nothing_is_no_import():
    bench = Bench(peers=False)
    assert (await bench.run()).disk_tokens == 0
    assert bench.asked == ["disk"]
    assert not bench.count("disk", "none")


async def test_the_last_token_is_never_imported():
    bench = Bench()
    bench.on_disk, bench.token_seconds = 10, 1.0
    assert (await bench.run()).disk_tokens == 40
    assert bench.read_range == (0, 10)
    whole = PromptBlocks(PROMPT[:40], BLOCK, root_key("full", ""), "")
    done = await bench.importer.run(ImportRequest("r", PROMPT[:40], whole, list(range(10)), 0, None))
    assert (done.tokens, bench.read_range) == (36, (0, 9))


class Stuck:
    """A loan that never ends by itself; ``joined`` is true once nothing writes."""

    def __init__(self):
        self.begun, self.joined = asyncio.Event(), False

    async def __call__(self):
        try:
            self.begun.set()
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            self.joined = True


async def test_a_frozen_holder_costs_one_bounded_wait(monkeypatch):
    monkeypatch.setattr(imports, "MIN_IMPORT_TIME", 0.01)
    bench = Bench(disk=False)
    bench.token_seconds = 0.0001
    bench.lends = stuck = Stuck()
    assert (await bench.run(cached=4)).tokens == 4
    assert stuck.joined
    assert bench.count("peer", "deadline") == 1
    await bench.run()
    assert bench.asked == ["peer"], "the second prompt does not wait again"


async def test_a_disk_that_hangs_is_left_alone_and_the_holder_is_not_blamed(monkeypatch):
    monkeypatch.setattr(imports, "MIN_IMPORT_TIME", 0.01)
    bench = Bench()
    bench.token_seconds, bench.on_disk, bench.disk_hangs = 0.0002, 10, True
    bench.importer._of_disk.note(0.1, 100_000)  # it was quick before
    bench.importer._rates["other", 1] = rate = imports.SourceCost()
    rate.note(1e-4, 40)
    assert (await bench.run()).tokens == 0
    assert (bench.asked, bench.count("peer", "deadline")) == (["disk"], 0)
    assert (await bench.run()).peer_tokens == 40
    assert bench.asked == ["disk", "peer"]


@pytest.mark.parametrize(("token_seconds", "limit"), [(0.0, 1.0), (0.001, 1.0), (0.1, 8.0), (1.0, 10.0)])
def test_an_import_may_take_twice_as_long_as_computing_within_bounds(token_seconds, limit):
    bench = Bench()
    bench.token_seconds = token_seconds
    assert bench.importer._time_limit(40) == limit


async def test_a_cancelled_import_has_ended_its_writers():
    bench = Bench(disk=False)
    bench.lends = stuck = Stuck()
    running = asyncio.ensure_future(bench.run())
    await stuck.begun.wait()
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert stuck.joined


async def test_the_loss_of_a_rank_is_not_a_miss_because_others_may_still_write():
    bench = Bench(disk=False)
    bench.lends = RankLost("rank 1 has gone")
    with pytest.raises(RankLost):
        await bench.run()


async def test_a_worker_tells_what_kv_costs_it():
    bench = Bench()
    bench.token_seconds = 2e-3
    bench.importer._of_peers.note(4e-3, 40)
    bench.importer._of_disk.note(5e-3, 1000)
    costs = bench.importer.costs
    assert (costs.compute_ns, costs.peer_ns, costs.disk_ns) == (2_000_000, 100_000, 5_000)


def test_a_large_import_weighs_more_than_a_small_one():
    rate = imports.SourceCost()
    rate.note(0.1, 1000)
    rate.note(0.1, 10)
    assert rate.seconds_per_token == pytest.approx(0.18 / 810)

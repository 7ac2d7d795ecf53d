"""Tests where the router expects a prompt's KV, which worker it names as a holder, and what follows for placements."""

import itertools
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jobs import make_job, worker_info

from overfill.kv.keys import PromptKeys
from overfill.routing import prefix_index
from overfill.routing.dispatcher import Dispatcher
from overfill.routing.invariant import check
from overfill.routing.job import ExpectedKv
from overfill.routing.policies import POLICIES
from overfill.routing.pool import Roster
from overfill.routing.pool_invariant import check_prefixes
from overfill.routing.prefix_index import PROMISED_BLOCKS
from overfill.routing.tier import DEFAULT_TIER
from overfill.routing.worker import DECODE, DEFAULT_IMPORT_COST, PREFILL, STALE_AFTER
from overfill.v1 import decode_pb2, registry_pb2

BLOCK = 16


def prompt_keys(tokens):
    return PromptKeys(7, range(tokens))


def job_of(tokens, name="a", **more):
    return make_job(name, tokens, 10, block_keys=prompt_keys(tokens), **more)


class Stack:
    """A roster of workers with prefill only (``p``), with decode only (``d``) and with both stages (``c``)."""

    def __init__(self, *names, lends=True, policy="conditional"):
        self.roster = Roster()
        self.roster.use(POLICIES[policy](1), POLICIES["session-affinity"])
        self.dispatcher = Dispatcher(self.roster)
        self.names = itertools.count()
        for name in names:
            self.join(name, lends=lends)

    def join(self, name, incarnation=1, *, lends=True):
        stages = {"p": [PREFILL], "d": [DECODE], "c": [PREFILL, DECODE]}[name[0]]
        infos = [worker_info(name, stage, incarnation, colocated=len(stages) > 1, lends_kv=lends) for stage in stages]
        if len(infos) > 1:
            infos[1] = replace(infos[1], lends_kv=False)  # its reports are of the prefill stage
        for worker in self.roster.join_all(infos):
            self.report(worker)

    def report(
        self, worker, tokens=None, on_disk=None, *, now=0.0, block_size=BLOCK, costs=None, draining=False, **load
    ):
        """Reports the first ``tokens`` tokens of the prompt as in memory, and ``on_disk`` ones as on disk."""
        worker = self[worker] if isinstance(worker, str) else worker
        load = decode_pb2.WorkerLoad(kv_blocks_total=10_000, block_size=block_size, **load)
        report = registry_pb2.Report(load=load, credits=1000, ready=True, draining=draining, costs=costs)
        for field, length in (("prefix", tokens), ("disk", on_disk)):
            if length is not None:
                delta = registry_pb2.PrefixDelta(added=list(prompt_keys(length)(block_size)), replaces=True)
                getattr(report, field).CopyFrom(delta)
        self.dispatcher.report(worker, report, now)

    def __getitem__(self, name):
        return self.roster.find(name)

    def expected(self, job, worker):
        check_prefixes(self.roster.prefixes, self.roster.workers())
        return next(self.roster.prefixes._expected(job, [self[worker]]))[1]

    def place(self, job, now=0.0):
        """Runs the job until it has a prefill worker."""
        self.dispatcher.submit(job, now)
        self.dispatcher.poll(now)
        assert self.dispatcher.prefill_with_start(job) is job.prefill
        self.dispatcher.reserved(job)
        check(self.dispatcher, now)
        return job


# Which worker is named ----------------------------------------------------------------------------------------------


def test_the_worker_with_the_most_of_the_prompt_is_the_holder():
    stack = Stack("p0", "p1", "p2")
    stack.report("p1", 160)
    stack.report("p2", 320)
    assert stack.expected(job_of(500), "p0") == ExpectedKv(0, 320, 0, 212, stack["p2"], 320)
    assert stack.expected(job_of(500), "p1") == ExpectedKv(160, 160, 0, 196, stack["p2"], 320)
    assert stack.expected(job_of(500), "p2") == ExpectedKv(320, cost=180), "it has more than any other"
    assert stack.expected(job_of(320), "p0").peer == 304, "a token is left to compute"
    assert stack.expected(make_job("a", 500, 10), "p0") == ExpectedKv(cost=500), "its keys are unknown"


def test_a_decode_worker_that_lends_is_a_holder_and_one_that_does_not_is_none():
    stack = Stack("p0", "d0")
    stack.join("d1", lends=False)
    stack.report("d1", 480)
    stack.report("d0", 320)
    assert stack.expected(job_of(500), "p0").holder is stack["d0"]
    assert not stack["d1"].prefix_keys
    stack.report("p0", 320, running=3)
    stack.join("p1")
    assert stack.expected(job_of(500), "p1").holder is stack["p0"], "a loan may delay the steps of a decode worker"
    stack.report("d0", 336)
    assert stack.expected(job_of(500), "p1").holder is stack["d0"]


def test_promised_blocks_are_not_lent_before_they_are_reported():
    stack = Stack("p0", "p1")
    stack.report("p1", 160)
    stack.roster.prefixes.place(job_of(500), stack["p1"])
    assert stack.expected(job_of(500), "p1").memory == 496
    assert stack.expected(job_of(500), "p0") == ExpectedKv(0, 160, 0, 356, stack["p1"], 160)


def test_a_worker_of_both_stages_lends_what_its_prefill_stage_has():
    stack = Stack("p0", "p1", "c0")
    stack.report("p1", 320, running=1)
    stack.report(stack.roster.prefill.get("c0"), 320)
    assert stack.expected(job_of(500), "p0").holder is stack.roster.prefill.get("c0")


@pytest.mark.parametrize(("lends", "borrows"), [(False, True), (True, False)])
def test_a_worker_that_takes_no_part_neither_lends_nor_borrows(lends, borrows):
    stack = Stack()
    stack.join("p0", lends=borrows)
    stack.join("p1", lends=lends)
    stack.report("p1", 320)
    assert stack.expected(job_of(500), "p0") == ExpectedKv(cost=500)


@pytest.mark.parametrize("loss", ["the Join broke", "another incarnation", "silent", "failed a request", "avoided"])
def test_a_worker_that_is_lost_is_named_no_more(loss):
    stack = Stack("p0", "p1", "p2")
    stack.report("p1", 160)
    stack.report("p2", 320)
    pool, job, lost = stack.roster.prefill, job_of(500), stack["p2"]
    if loss == "the Join broke":
        pool.remove(lost)
        assert not lost.prefix_keys
    elif loss == "another incarnation":
        stack.join("p2", 2)
    elif loss == "silent":
        for name in ("p0", "p1"):
            stack.report(name, now=STALE_AFTER + 1)
        pool.expire(STALE_AFTER + 1)
    elif loss == "failed a request":
        pool.pause(lost)
    else:
        job.avoid.add(lost.seat)
    assert stack.expected(job, "p0").holder is stack["p1"]


def test_a_worker_that_reports_again_lends_again():
    stack = Stack("p0", "p1")
    stack.report("p1", 320)
    stack.roster.prefill.expire(STALE_AFTER + 1)
    assert stack.expected(job_of(500), "p0").holder is None
    stack.report("p1", now=STALE_AFTER + 1)
    assert stack.expected(job_of(500), "p0").holder is stack["p1"]


def test_a_draining_worker_lends_until_it_leaves_or_falls_silent():
    stack = Stack("p0", "p1")
    stack.report("p1", 320, draining=True)
    stack.join("d0")
    job = stack.place(job_of(500))
    assert (job.prefill, job.expected.holder) == (stack["p0"], stack["p1"])
    stack.dispatcher.finish(job)
    assert stack.expected(job_of(500), "p0").holder is stack["p1"]
    stack.roster.prefill.expire(STALE_AFTER + 1)
    assert stack.expected(job_of(500), "p0").holder is None


def test_the_holder_with_the_least_load_is_named_and_equal_ones_take_turns():
    stack = Stack("p0", *(f"p{index}" for index in range(1, 31)))
    for index in range(1, 31):
        stack.report(f"p{index}", 320, running=index % 3)

    def named(count):
        return [stack.roster.prefixes.place(job_of(500), stack["p0"]).holder for _ in range(count)]

    # p0 is promised the blocks, so it borrows them once.
    first = stack.roster.prefixes.place(job_of(500), stack["p0"]).holder
    assert first.requests == 0
    assert named(1) == [None]
    stack.roster.prefixes.not_computed(job_of(500), stack["p0"])
    idle = Counter()
    for _ in range(60):
        (holder,) = named(1)
        idle[holder.id] += 1
        stack.roster.prefixes.not_computed(job_of(500), stack["p0"])
    assert len(idle) == 30, "with more equal holders than are compared at once, each has its turn"


@pytest.mark.parametrize("policy", [name for name in POLICIES if name != "most-free-kv"])
def test_each_policy_names_a_holder(policy):
    stack = Stack("p0", "p1", "d0", policy=policy)
    stack.report("p1", 320, queued_tokens=100_000, running=50)
    seen = set()
    for index in range(20):
        job = stack.place(job_of(500, f"j{index}"))
        if job.prefill is stack["p0"]:
            seen.add(job.expected.holder)
            assert (job.expected.peer, job.expected.holder_tokens) in ((320, 320), (0, 0))
        stack.dispatcher.finish(job)  # it was not computed, so nothing is promised
        assert job.expected == ExpectedKv()
    assert seen == {stack["p1"]}


# What a prompt costs ------------------------------------------------------------------------------------------------


def costs(peer, disk):
    return registry_pb2.KvCosts(compute_ns=100, peer_ns=peer, disk_ns=disk)


def test_kv_is_expected_from_where_the_worker_gets_it_sooner():
    stack = Stack("p0", "p1")
    stack.report("p1", 320)
    for reported, peer, disk, cost in (
        (None, 0, 400, 500 - 80 - round(320 * 0.9)),  # what peers and disks cost is unknown, so it is equal
        (costs(20, 10), 0, 400, None),
        (costs(10, 20), 240, 160, 500 - 80 - round(240 * 0.9) - round(160 * 0.8)),
        (costs(200, 20), 0, 400, None),
        (costs(10, 900), 240, 160, 500 - 80 - round(240 * 0.9)),  # from disk, it takes longer than to compute
    ):
        stack.report("p0", 80, 480, costs=reported)
        found = stack.expected(job_of(500), "p0")
        assert (found.memory, found.peer, found.disk) == (80, peer, disk)
        assert (found.holder is stack["p1"]) is bool(peer)
        if cost is not None and peer:
            assert found.cost == cost
    stack.report("p0", 0, 160, costs=costs(20, 10))
    assert stack.expected(job_of(500), "p0")[:4] == (0, 160, 160, 500 - int(160 * 0.9 + 160 * 0.8)), "then the rest"


def test_kv_on_disk_counts_from_where_memory_ends():
    stack = Stack("p0")
    keys = list(prompt_keys(320)(BLOCK))
    stack.report("p0", 160)
    report = registry_pb2.Report(credits=9, ready=True, disk=registry_pb2.PrefixDelta(added=keys[10:18]))
    report.load.kv_blocks_total, report.load.block_size = 1000, BLOCK
    stack.dispatcher.report(stack["p0"], report, 0.0)
    assert stack.expected(job_of(500), "p0")[:3] == (160, 0, 128)
    report.disk.CopyFrom(registry_pb2.PrefixDelta(removed=keys[10:11]))
    stack.dispatcher.report(stack["p0"], report, 0.0)
    assert stack.expected(job_of(500), "p0")[:3] == (160, 0, 0)


def test_a_worker_that_has_the_prompt_on_disk_gets_it_after_a_restart():
    stack = Stack("p0", "p1", "p2", "d0")
    stack.report("p2", 0, 480)
    job = stack.place(job_of(500))
    assert (job.prefill, job.expected.disk) == (stack["p2"], 480)
    assert stack["p2"].queued_tokens == 500 - int(480 * (1 - DEFAULT_IMPORT_COST))


def test_what_a_worker_says_of_its_costs_stays_until_it_says_otherwise():
    stack = Stack("p0")
    stack.report("p0", costs=costs(20, 0))
    stack.report("p0")
    assert (stack["p0"].peer_cost, stack["p0"].disk_cost) == (0.2, DEFAULT_IMPORT_COST)
    stack.report("p0", costs=costs(101, 1))
    assert (stack["p0"].peer_cost, stack["p0"].disk_cost) == (1.0, 0.01)


def hot_prefix(lends):
    """Places 1,000 requests with one prefix on four workers. The first is computed alone, the others eight at a time.

    Returns:
        The number of requests on each worker, and the names of the workers that were to borrow, in order.
    """
    stack = Stack("p0", "p1", "p2", "p3", "d0", lends=lends)
    shared, counts, borrowed = PROMISED_BLOCKS * BLOCK, Counter(), []
    keys = prompt_keys(shared)
    running = []
    for index in range(1000):
        job = stack.place(make_job(f"j{index}", shared + 40, 10, block_keys=keys))
        counts[job.prefill.id] += 1
        if job.expected.holder is not None:
            borrowed.append(job.prefill.id)
        running.append(job)
        if index == 0 or len(running) == 8:  # the workers have computed them, and report
            for done in running:
                here = done.prefill
                stack.dispatcher.prefill_done(done, 0.0)
                stack.dispatcher.finish(done)
                stack.report(here, shared)
            running.clear()
            stack.report("d0")
    return counts, borrowed


def test_a_hot_prefix_spreads_over_the_workers_and_each_borrows_it_once():
    counts, borrowed = hot_prefix(lends=False)
    assert max(counts.values()) > 900, "without loans, it stays on the worker that has it"
    assert borrowed == []
    counts, borrowed = hot_prefix(lends=True)
    assert min(counts.values()) > 200
    assert sorted(borrowed) == sorted(set(borrowed))
    assert len(borrowed) == 3, "all but the first, which computed it"


# Bounds -------------------------------------------------------------------------------------------------------------


def test_keys_beyond_the_limit_of_a_worker_are_ignored(monkeypatch):
    monkeypatch.setattr(prefix_index, "MAX_WORKER_KEYS", 10)
    stack = Stack("p0", "p1")
    for begin in (0, 5, 15):
        report = registry_pb2.Report(credits=9, ready=True)
        report.load.block_size = BLOCK
        report.prefix.added.extend(list(prompt_keys(320)(BLOCK))[begin:])
        report.disk.added.extend(list(prompt_keys(480)(BLOCK))[begin:])
        stack.dispatcher.report(stack["p0"], report, 0.0)
    assert len(stack["p0"].prefix_keys) == len(stack["p0"].disk_keys) == 10
    assert stack.expected(job_of(500), "p1").peer == 160


@pytest.mark.parametrize("block_size", [0, 32])
def test_a_worker_that_reports_another_block_size_than_its_keys_have_is_named_no_more(block_size):
    stack = Stack("p0", "p1", "p2")
    stack.report("p1", 160)
    stack.report("p2", 320)
    stack.report("p2", block_size=block_size)
    assert stack.roster.prefixes.place(job_of(500), stack["p0"]).holder is stack["p1"]


def test_the_oldest_promises_end_when_there_are_too_many(monkeypatch):
    monkeypatch.setattr(prefix_index, "MAX_PROMISES", 3 * PROMISED_BLOCKS)
    stack = Stack("p0")
    jobs = [make_job(str(n), 4096, 10, block_keys=PromptKeys(n, range(4096))) for n in range(5)]
    for job in jobs:
        stack.roster.prefixes.place(job, stack["p0"])
        assert stack.expected(job, "p0").memory == PROMISED_BLOCKS * BLOCK
    assert [stack.expected(job, "p0").memory > 0 for job in jobs] == [False, False, True, True, True]
    stack.roster.prefill.remove(stack["p0"])
    check_prefixes(stack.roster.prefixes, ())
    assert not stack.roster.prefixes._parts[0].memory


# Against a plain implementation -------------------------------------------------------------------------------------


NAMES = ["p0", "p1", "p2", "p3", "c0", "c1", "d0", "d1"]
SIZES = [16, 16, 32]
LENGTHS = st.integers(0, 12)


def plain_blocks(job, worker, keys, begin=0):
    for index, key in enumerate(itertools.islice(job.block_keys(worker.block_size), begin, None), begin):
        if key not in keys:
            return index
    return max(begin, sum(1 for _ in job.block_keys(worker.block_size)))


def plain_expected(roster, job, worker):
    """What is expected of the worker, and all the holders that may be named, by the definition."""
    size, most = worker.block_size, job.importable_tokens // worker.block_size * worker.block_size
    blocks = plain_blocks(job, worker, worker.prefix_keys)
    memory = blocks * size
    on_disk = max(memory, min(plain_blocks(job, worker, worker.disk_keys, blocks) * size, most))
    held = {
        other: tokens
        for other in roster.workers()
        if other is not worker and worker.info.lends_kv and other.lends and other.seat not in job.avoid
        if (tokens := other.block_size * plain_blocks(job, other, other.prefix_keys))
    }
    limit = job.importable_tokens
    longest = max((min(tokens, limit) for tokens in held.values()), default=0)
    at_peer = max(memory, min(longest, limit) // size * size)
    if worker.disk_cost <= worker.peer_cost:
        disk, peer = on_disk - memory, max(0, at_peer - on_disk)
    else:
        disk, peer = max(0, on_disk - at_peer), at_peer - memory
    holders = {other for other, tokens in held.items() if min(tokens, limit) == longest} if peer else {None}
    best = min(((h.info.stage, h.requests + h.named) for h in holders if h is not None), default=None)
    return (memory, peer, disk), {h for h in holders if h is None or (h.info.stage, h.requests + h.named) == best} or {
        None
    }


@settings(max_examples=400, deadline=None)
@given(
    workers=st.dictionaries(st.sampled_from(NAMES), st.tuples(st.booleans(), st.sampled_from(SIZES)), min_size=1),
    reports=st.lists(st.tuples(st.sampled_from(NAMES), LENGTHS, st.none() | LENGTHS, st.integers(0, 2)), max_size=16),
    rates=st.dictionaries(st.sampled_from(NAMES), st.tuples(st.integers(0, 150), st.integers(0, 150))),
    gone=st.lists(
        st.tuples(st.sampled_from(NAMES), st.sampled_from(["leaves", "paused", "drains", "avoided"])), max_size=3
    ),
    prompt=st.integers(1, 200),
    answer_start=st.none() | st.integers(1, 200),
)
def test_what_is_expected_is_what_the_definition_says(workers, reports, rates, gone, prompt, answer_start):
    stack = Stack()
    stack.join("d9", lends=False)
    for name, (lends, _) in sorted(workers.items()):
        stack.join(name, lends=lends)
    pools = stack.roster
    job = job_of(prompt)
    if answer_start is not None and answer_start <= prompt:
        job.start.answer_start = answer_start
        job.block_keys = prompt_keys(answer_start)
    prefill = list(pools.prefill)

    def reporting(name):
        return pools.prefill.get(name) or pools.decode[DEFAULT_TIER].get(name)

    for name, blocks, on_disk, running in [*((name, 0, None, 0) for name in workers), *reports]:
        if name in workers:
            size = workers[name][1]
            where = reporting(name)
            rate = costs(*rates[name]) if name in rates else None
            disk = None if where.info.stage == DECODE or on_disk is None else on_disk * size
            stack.report(where, blocks * size, disk, block_size=size, running=running, costs=rate)
    for name, how in gone:
        if (worker := reporting(name)) is not None:
            if how == "leaves":
                pools.pool_of(worker).remove(worker)
            elif how == "paused":
                pools.pool_of(worker).pause(worker)
            elif how == "drains":
                stack.report(worker, block_size=workers[name][1], draining=True)
            else:
                job.avoid.add(worker.seat)
    check_prefixes(pools.prefixes, pools.workers())
    for worker in prefill:
        if pools.prefill.get(worker.id) is worker:
            found = next(pools.prefixes._expected(job, [worker]))[1]
            parts, holders = plain_expected(pools, job, worker)
            assert found[:3] == parts
            assert found.holder in holders
            assert pools.prefixes.costs(job, [worker]) == {worker: found.cost}
    for worker in prefill:
        if pools.prefill.get(worker.id) is worker:
            pools.prefixes.place(job, worker)
            check_prefixes(pools.prefixes, pools.workers())
            pools.prefixes.not_computed(job, worker)
            check_prefixes(pools.prefixes, pools.workers())
    assert not any(False in level.values() for part in pools.prefixes._parts for level in part.memory.values())


def test_placing_looks_at_as_many_blocks_and_workers_among_a_thousand_as_among_ten():
    """The cost of a placement does not grow with the workers that have the prompt, nor with those that have none."""

    def looks(count):
        stack = Stack(*(f"p{index}" for index in range(count)))
        for worker in stack.roster.prefill:
            stack.report(worker, 320)
        looked = Counter()

        class Counted(dict):
            def __iter__(self):
                for key in super().__iter__():
                    looked["workers"] += 1
                    yield key

        part = stack.roster.prefixes._parts[0]
        part.memory = {key: Counted(level) for key, level in part.memory.items()}
        job = job_of(500)
        next(stack.roster.prefill.policy.best(job))
        stack.roster.prefixes.place(job, next(iter(stack.roster.prefill)))
        return looked["workers"]

    assert 0 < looks(1000) == looks(10)

"""Tests routing policies: load, free KV, two random choices, and prefix affinity."""

import pytest
from jobs import make_job

from overfill.kv.keys import PromptKeys
from overfill.routing.affinity import PrefixAffinity
from overfill.routing.dispatcher import Dispatcher
from overfill.routing.policies import DECODE_POLICIES, POLICIES
from overfill.routing.policy import LeastLoad, MostFreeKv, PowerOfTwo, RoundRobin
from overfill.routing.pool import Roster
from overfill.routing.pool_invariant import check_pool, check_prefixes
from overfill.routing.tier import DEFAULT_TIER
from overfill.routing.worker import DECODE, PREFILL
from overfill.settings.config import RouterConfig
from overfill.v1 import registry_pb2


def placed(pool, job, worker):
    """Records a placement and returns the number of tokens that ``worker`` has in memory."""
    pool.policy.placed(job, worker)
    return pool.prefixes.place(job, worker).memory


def choose(pool, prompt=10, keys=None):
    return next(pool.policy.best(make_job("a", prompt, 10, block_keys=keys)), None)


@pytest.fixture
def prefill():
    roster = Roster()

    def use(policy):
        roster.prefill.use(policy)
        return roster

    return use


@pytest.mark.parametrize(
    ("policy", "stage", "other", "chosen"),
    [
        (LeastLoad, PREFILL, {"queued_tokens": 5000}, {"queued_tokens": 100, "running": 9}),
        (LeastLoad, DECODE, {"running": 3}, {"running": 1}),  # requests of other routers
        (MostFreeKv, DECODE, {"used": 50}, {"used": 40, "running": 9}),
    ],
)
def test_the_worker_that_has_more_of_what_the_policy_wants_is_chosen(add_worker, policy, stage, other, chosen):
    roster = Roster()
    add_worker(roster, "w0", stage, **other)
    pool = roster.pool_of(add_worker(roster, "w1", stage, **chosen))
    pool.use(policy())
    assert choose(pool).id == "w1"


def test_least_load_counts_prompts_placed_since_the_report(add_worker, prefill):
    roster = prefill(LeastLoad())
    add_worker(roster, "p0", PREFILL)
    add_worker(roster, "p1", PREFILL)
    chosen = []
    for tokens in (1000, 10, 10):
        worker = choose(roster.prefill, tokens)
        roster.prefill.place(worker, tokens)
        chosen.append(worker.id)
    assert chosen == ["p0", "p1", "p1"]


@pytest.mark.parametrize("kind", [LeastLoad, RoundRobin, MostFreeKv])
def test_equal_workers_take_turns(add_worker, make_report, kind):
    roster = Roster()
    pool = roster.decode[DEFAULT_TIER]
    pool.use(kind())
    for name in ("d0", "d1", "d2"):
        add_worker(roster, name)
    chosen = []
    for _ in range(6):
        worker = choose(pool)
        pool.place(worker, 10)
        pool.release(worker)
        pool.report(worker, make_report(), 0.0)
        chosen.append(worker.id)
    assert chosen == ["d0", "d1", "d2"] * 2


def test_of_two_drawn_workers_the_less_loaded_is_chosen(add_worker):
    roster = Roster()
    pool = roster.decode[DEFAULT_TIER]
    pool.use(PowerOfTwo(seed=1))
    for index in range(10):
        add_worker(roster, f"d{index}", running=index)
    chosen = [choose(pool).id for _ in range(200)]
    assert len(set(chosen)) > 5, "the draws differ"
    assert "d9" not in chosen, "the most loaded worker loses every comparison"
    assert len(set(pool.policy.best(make_job("a", 10, 10)))) == 10, "the others follow"


# Prefix affinity ---------------------------------------------------------------------------------------------------


def keys(*blocks, block_size=16):
    return PromptKeys(7, [token for block in blocks for token in [block] * block_size])


def promised(pool):
    blocks = pool.prefixes._parts[0].memory
    return {worker for level in blocks.values() for worker, is_reported in level.items() if not is_reported}


def tell(roster, worker, make_report, prompt, **load):
    report = make_report(**load)
    report.prefix.CopyFrom(registry_pb2.PrefixDelta(added=list(prompt(report.load.block_size))))
    roster.prefill.report(worker, report, 0.0)


@pytest.fixture
def affinity(prefill, add_worker):
    roster = prefill(PrefixAffinity())
    for name in ("p0", "p1", "p2"):
        add_worker(roster, name, PREFILL)
    return roster


def test_a_prompt_goes_where_most_of_it_is_cached(affinity, make_report):
    pool = affinity.prefill
    tell(affinity, pool.get("p1"), make_report, keys(1, 2))
    tell(affinity, pool.get("p2"), make_report, keys(1, 2, 3))
    assert choose(pool, 64, keys(1, 2, 3, 4)).id == "p2"
    assert choose(pool, 64, keys(1, 2, 9, 4)).id == "p1", "both cache the same length, so the order decides"
    assert choose(pool, 64, keys(5, 2, 3, 4)).id == "p0", "a block matches only after the same earlier blocks"


def test_affinity_yields_to_load_when_the_queue_is_longer_than_what_the_cache_saves(affinity, make_report):
    pool = affinity.prefill
    tell(affinity, pool.get("p1"), make_report, keys(1, 2, 3, 4), queued_tokens=63)
    assert choose(pool, 80, keys(1, 2, 3, 4, 5)).id == "p1"
    tell(affinity, pool.get("p1"), make_report, keys(1, 2, 3, 4), queued_tokens=65)
    assert choose(pool, 80, keys(1, 2, 3, 4, 5)).id == "p0"


def test_a_prefix_that_every_worker_has_does_not_unbalance_the_pool(affinity, make_report, add_worker):
    pool = affinity.prefill
    for index in range(40):
        worker = add_worker(affinity, f"q{index:02}", PREFILL)
        tell(affinity, worker, make_report, keys(1), queued_tokens=0 if index == 33 else 100)
    for name in ("p0", "p1", "p2"):
        tell(affinity, pool.get(name), make_report, keys(1), queued_tokens=100)
    assert choose(pool, 32, keys(1, 2)).id == "q33"


def test_a_prompt_attracts_similar_ones_to_its_worker_before_the_next_report(affinity, make_report):
    pool = affinity.prefill
    first = make_job("a", 64, 10, block_keys=keys(1, 2, 3, 4))
    worker = choose(pool, 64, first.block_keys)
    assert placed(pool, first, worker) == 0
    pool.place(worker, 16)
    second = make_job("b", 64, 10, block_keys=keys(1, 2, 3, 9))
    assert choose(pool, 64, second.block_keys) is worker
    assert placed(pool, second, worker) == 48, "cached tokens do not count as queued work"


def test_workers_of_other_block_sizes_are_compared_by_cached_tokens(affinity, make_report):
    pool = affinity.prefill
    fine, coarse = pool.get("p1"), pool.get("p2")
    tell(affinity, coarse, make_report, keys(1, 2, 3, 4, 5), block_size=64)
    tell(affinity, fine, make_report, keys(1, 2, 3))
    prompt = keys(1, 2, 3, 4, 5, 6)
    assert choose(pool, 96, prompt) is coarse, "one block of 64 tokens is more than three of 16"
    assert placed(pool, make_job("a", 96, 10, block_keys=prompt), coarse) == 64
    tell(affinity, fine, make_report, keys(1, 2, 3, 4, 5))
    assert choose(pool, 96, prompt) is fine
    check_pool(pool, 0.0)
    check_prefixes(pool.prefixes, pool)


def test_a_promise_counts_in_the_block_size_of_its_worker(affinity, make_report):
    pool = affinity.prefill
    coarse, prompt = pool.get("p2"), keys(1, 2, 3, 4, 5)
    pool.report(coarse, make_report(block_size=64), 0.0)
    pool.report(pool.get("p1"), make_report(), 0.0)
    placed(pool, make_job("a", 80, 10, block_keys=prompt), coarse)
    assert choose(pool, 80, prompt) is coarse
    assert placed(pool, make_job("b", 80, 10, block_keys=prompt), coarse) == 64


def test_evicted_blocks_and_those_of_a_worker_that_left_attract_no_prompts(affinity, make_report):
    pool = affinity.prefill
    prompt = keys(1, 2)
    tell(affinity, pool.get("p1"), make_report, prompt)
    report = make_report()
    report.prefix.CopyFrom(registry_pb2.PrefixDelta(removed=list(prompt(16))))
    pool.report(pool.get("p1"), report, 0.0)
    assert choose(pool, 40, prompt).id == "p0"
    tell(affinity, pool.get("p2"), make_report, prompt)
    pool.remove(pool.get("p2"))
    assert choose(pool, 40, prompt).id == "p0"
    check_pool(pool, 0.0)
    check_prefixes(pool.prefixes, pool)


def test_a_promise_ends_when_the_prompt_is_not_computed_or_its_worker_leaves(affinity):
    pool, dispatcher = affinity.prefill, Dispatcher(affinity)
    prompt = keys(1, 2, 3, 4)
    failed = make_job("a", 64, 10, block_keys=prompt)
    failed.prefill = choose(pool, 64, prompt)
    pool.place(failed.prefill, 64, placed(pool, failed, failed.prefill))
    assert promised(pool)
    dispatcher.prefill_done(failed)  # its first token never came
    assert not promised(pool)
    worker = choose(pool, 64, prompt)
    placed(pool, make_job("b", 64, 10, block_keys=prompt), worker)
    pool.remove(worker)
    assert not promised(pool)


@pytest.mark.parametrize("name", DECODE_POLICIES)
def test_prompts_that_begin_alike_spread_over_the_decode_workers(add_worker, name):
    roster = Roster()
    roster.decode[DEFAULT_TIER].use(POLICIES[name](seed=3))
    workers = [add_worker(roster, f"d{index}", credits=64, total=10_000) for index in range(4)]
    for index in range(40):
        job = make_job(str(index), 64, 10, block_keys=lambda size: iter(range(4)))
        chosen = next(roster.decode[DEFAULT_TIER].policy.best(job))
        roster.decode[DEFAULT_TIER].policy.placed(job, chosen)
        roster.decode[DEFAULT_TIER].place(chosen, job.reserve_tokens)
    assert max(worker.in_flight for worker in workers) <= 20


def test_decode_workers_which_say_nothing_of_their_caches_have_no_affinity():
    assert set(POLICIES) - set(DECODE_POLICIES) == {"conditional", "prefix-affinity"}
    with pytest.raises(SystemExit):
        RouterConfig.parse(["--pair", "p", "--decode-policy", "prefix-affinity"])

"""Tests what sessions change: the order of workers and of a key's waiting jobs; and what the router keeps of them."""

import itertools
import random
from collections import Counter

import pytest
from jobs import make_job

from overfill.kv.keys import PromptKeys
from overfill.routing.affinity import SESSION_TOKENS, PrefixAffinity
from overfill.routing.fair_queue import FairQueue
from overfill.routing.pool import Roster
from overfill.routing.pool_invariant import check_pool
from overfill.routing.prefix_index import PROMISED_BLOCKS
from overfill.routing.session_stats import ACTIVE_SECONDS, MAX_ACTIVE, MAX_BUSIEST, SessionStats, busiest_of
from overfill.routing.sessions import MAX_SESSIONS, SessionAffinity
from overfill.routing.tier import DEFAULT_TIER
from overfill.routing.worker import PREFILL
from overfill.v1 import common_pb2, registry_pb2


def job_of(session, tokens=10, name="a", **more):
    return make_job(name, tokens, 10, session=session, **more)


def place(pool, job):
    worker = next(pool.policy.best(job))
    pool.policy.placed(job, worker)
    pool.place(worker, job.prompt_tokens, job.prompt_tokens - pool.prefixes.place(job, worker).cost)
    return worker


@pytest.fixture
def decode(add_worker):
    roster = Roster()
    pool = roster.decode[DEFAULT_TIER]
    pool.use(SessionAffinity())
    for name in ("d0", "d1", "d2"):
        add_worker(roster, name, credits=100, total=10_000)
    return pool


@pytest.fixture
def prefill(add_worker):
    roster = Roster()
    roster.prefill.use(PrefixAffinity())
    for name in ("p0", "p1", "p2"):
        add_worker(roster, name, PREFILL, credits=100, total=10_000)
    return roster.prefill


@pytest.mark.parametrize("stage", ["prefill", "decode"])
def test_a_session_returns_to_its_worker_and_others_do_not_follow_it(stage, request):
    pool = request.getfixturevalue(stage)
    first = {}
    for name in ("s0", "s1", "s2"):
        first[name] = place(pool, job_of(name))
        pool.release(first[name])
    assert len(set(first.values())) == 3
    for name in ("s2", "s0", "s1", "s1", "s0"):
        worker = place(pool, job_of(name))
        pool.release(worker)
        assert worker is first[name]
    assert len({place(pool, job_of("s0", key=key)) for key in ("", "k1", "k2")}) == 3, "a session is one key's"
    check_pool(pool, 0.0)


@pytest.mark.parametrize(("there", "elsewhere", "stays"), [(1, 0, True), (2, 0, False), (6, 4, True), (7, 4, False)])
def test_a_session_leaves_a_decode_worker_that_has_many_more_requests(decode, make_report, there, elsewhere, stays):
    worker = place(decode, job_of("s"))
    decode.release(worker)
    for other in decode:
        decode.report(other, make_report(credits=100, running=there if other is worker else elsewhere), 0.0)
    assert (next(decode.policy.best(job_of("s"))) is worker) is stays
    assert len(set(decode.policy.best(job_of("s")))) == 3, "the others follow, each once"


@pytest.mark.parametrize("stage", ["prefill", "decode"])
def test_a_session_forgets_a_worker_that_has_left_or_takes_nothing_now(stage, request):
    pool = request.getfixturevalue(stage)
    worker = place(pool, job_of("s"))
    pool.release(worker)
    pool.pause(worker)
    assert worker not in set(pool.policy.best(job_of("s")))
    pool.remove(worker)
    assert next(pool.policy.best(job_of("s"))) is not worker
    assert not len(pool.policy._latest)


def test_among_prefill_workers_a_longer_prefix_or_a_shorter_queue_counts_more_than_the_session(prefill, make_report):
    def tell(worker, prompt, **load):
        report = make_report(credits=100, total=10_000, **load)
        report.prefix.CopyFrom(registry_pb2.PrefixDelta(added=list(prompt(16))))
        prefill.report(worker, report, 0.0)

    job = job_of("s", 2048, block_keys=PromptKeys(7, range(2048)))
    here, there = prefill.get("p0"), prefill.get("p1")
    prefill.policy.placed(job_of("s"), here)
    for worker in (here, there):
        tell(worker, PromptKeys(7, range(1024)))
    assert next(prefill.policy.best(job)) is here
    tell(here, PromptKeys(7, range(16)), queued_tokens=SESSION_TOKENS - 1)
    assert next(prefill.policy.best(job)) is here
    tell(here, PromptKeys(7, range(16)), queued_tokens=SESSION_TOKENS + 1)
    assert next(prefill.policy.best(job)) is there
    tell(here, PromptKeys(7, range(16)))
    tell(there, PromptKeys(7, range(1024 + SESSION_TOKENS + 16)))
    assert next(prefill.policy.best(job)) is there


def test_what_follows_a_long_shared_beginning_is_promised_before_it_is_reported(prefill, make_report):
    shared = 16 * 2 * PROMISED_BLOCKS
    for worker in prefill:
        report = make_report(credits=100, total=10_000)
        report.prefix.CopyFrom(registry_pb2.PrefixDelta(added=list(PromptKeys(7, range(shared))(16))))
        prefill.report(worker, report, 0.0)
    turns = [
        make_job("a", shared + 640, 10, block_keys=PromptKeys(7, [*range(shared), *[agent] * 640])) for agent in (1, 2)
    ]
    first = [place(prefill, job) for job in turns]
    assert first[0] is not first[1]
    for worker in first:
        prefill.report(worker, make_report(credits=100, total=10_000), 0.0)
    assert [next(prefill.policy.best(job)) for job in turns] == first
    prefill.prefixes.not_computed(turns[0], first[0])
    levels = prefill.prefixes._parts[0].memory.values()
    assert {worker for level in levels for worker, reported in level.items() if not reported} == {first[1]}


def test_100000_sessions_stay_within_the_bounds(decode, prefill):
    stats = SessionStats()
    usage = common_pb2.Usage(prompt_tokens=10, cached_tokens=5)
    for index in range(100_000):
        job = job_of(f"s{index}")
        for pool in (decode, prefill):
            pool.policy.placed(job, pool.get("d1") or pool.get("p1"))
        stats.accepted(job)
        stats.answered(job, usage)
    assert len(decode.policy._latest) == len(prefill.policy._latest) == MAX_SESSIONS
    assert stats.num_active(0.0) == len(stats._sessions) == MAX_ACTIVE
    assert next(decode.policy.best(job_of("s99999"))).id == "d1"
    assert next(decode.policy.best(job_of("s0"))).id == "d0", "it is forgotten"


# Fairness ----------------------------------------------------------------------------------------------------------


def test_the_sessions_of_a_key_take_turns():
    queue = FairQueue()
    for index in range(100):
        queue.append(job_of("busy", name=f"busy-{index}", key="k"))
    queue.append(job_of("other", name="other", key="k"))
    queue.append(job_of("", name="none", key="k"))
    assert queue.ahead(0, "k", "new") == 3
    assert queue.ahead(0, "k", "other") == 4
    assert queue.ahead(0, "k", "busy") == queue.ahead(0, "k") == 102
    assert [job.id for job in queue][:5] == ["busy-0", "other", "none", "busy-1", "busy-2"]


def test_many_sessions_gain_a_key_nothing_over_other_keys():
    queue = FairQueue()
    for index in range(6):
        queue.append(job_of("one", name=f"plain-{index}", key="plain"))
        queue.append(job_of(f"s{index}", name=f"split-{index}", key="split"))
    assert [job.key for job in queue] == ["plain", "split"] * 6


@pytest.mark.parametrize("cancelled", [True, False])
def test_new_sessions_without_end_neither_grow_the_queue_nor_go_first_for_ever(cancelled):
    queue = FairQueue()
    for index in range(2):
        queue.append(job_of("waits", name=f"waits-{index}", key="k"))
    second = list(queue)[1]
    for index in range(10_000):
        queue.append(job_of(f"s{index}", name="new", key="k"))
        if cancelled:
            queue.discard(next(job for job in queue if job.session != "waits"))
        else:
            queue.take(next(iter(queue)))
        if jobs := queue._of_key.get((0, "k")):
            assert len(jobs._clock) < 2100
    assert (second in queue) is cancelled


@pytest.mark.parametrize("seed", range(20))
def test_sessions_change_no_order_among_keys_and_none_waits_long_for_others(seed):
    """Compares with a queue without sessions, over random arrivals and placements; half of the runs cancel jobs too."""
    draw = random.Random(seed)
    queue, plain = FairQueue(), FairQueue()
    for index in range(300):
        if draw.random() < 0.6 or not len(queue):
            key, session = draw.choice("kl"), draw.choice("abc")
            job = job_of(session, name=str(index), key=key)
            expected = queue.ahead(0, key, session)
            queue.append(job)
            plain.append(job_of("", name=str(index), key=key))
            assert list(queue).index(job) == expected
        else:
            places = list(zip(queue, plain, strict=True))
            at = draw.randrange(len(places)) if seed % 2 and draw.random() < 0.2 else 0
            for which, job in zip((queue, plain), places[at], strict=True):
                which.take(job) if at == 0 else which.discard(job)
        assert [job.key for job in queue] == [job.key for job in plain]
        for key in "kl":
            waiting = [job for job in queue if job.key == key]
            by_session = {s: [job for job in waiting if job.session == s] for s in "abc"}
            for jobs in by_session.values():
                assert [int(job.id) for job in jobs] == sorted(int(job.id) for job in jobs)
                for one, next_one in itertools.pairwise(jobs) if not seed % 2 else ():
                    between = waiting[waiting.index(one) + 1 : waiting.index(next_one)]
                    assert max(Counter(job.session for job in between).values(), default=0) <= 2
    for job in list(queue):
        queue.take(job)
    assert not queue._of_key, "nothing is kept of keys without jobs"


# Statistics --------------------------------------------------------------------------------------------------------


def test_turns_and_cached_share_of_the_busiest_sessions_without_their_names():
    stats = SessionStats()
    for index in range(7):
        for turn in range(index + 1):
            job = job_of(f"secret-{index}", received=float(turn))
            stats.accepted(job)
            stats.answered(job, common_pb2.Usage(prompt_tokens=100, cached_tokens=90 if turn else 0))
    without = job_of("", received=3.0)
    stats.accepted(without)
    stats.answered(without, common_pb2.Usage(prompt_tokens=100))
    assert stats.num_active(10.0) == 7
    busiest = stats.busiest(10.0)
    assert [(one.turns, one.prompt_tokens, one.cached_tokens) for one in busiest] == [
        (turns, 100 * turns, 90 * (turns - 1)) for turns in (7, 6, 5, 4, 3)
    ]
    assert len(busiest) == MAX_BUSIEST
    assert not any("secret" in one.id for one in busiest)
    assert len({one.id for one in busiest}) == MAX_BUSIEST
    assert stats.num_active(ACTIVE_SECONDS + 3.5) == 3
    assert len(stats.busiest(ACTIVE_SECONDS + 3.5)) == 3
    merged = busiest_of([busiest, busiest[1:]])
    assert [one.turns for one in merged] == [12, 10, 8, 7, 6]


def test_a_session_that_returns_after_it_was_idle_begins_anew():
    stats = SessionStats()
    for received in (0.0, ACTIVE_SECONDS + 1):
        job = job_of("s", received=received)
        stats.accepted(job)
        stats.answered(job, common_pb2.Usage(prompt_tokens=100))
    assert [one.turns for one in stats.busiest(ACTIVE_SECONDS + 1)] == [1]


@pytest.mark.parametrize(("there", "elsewhere", "follows"), [(1, 0, True), (8, 0, True), (9, 0, False), (13, 4, True)])
def test_tasks_of_one_prompt_meet_on_a_worker_unless_it_is_far_busier(decode, make_report, there, elsewhere, follows):
    worker = place(decode, job_of("", shared_prompt=1))
    assert place(decode, job_of("", shared_prompt=1)) is worker
    assert place(decode, job_of("", shared_prompt=1, key="k")) is not worker, "KV is one key's"
    for other in decode:
        decode.report(other, make_report(running=there if other is worker else elsewhere, credits=100), 0.0)
    assert (place(decode, job_of("s", shared_prompt=1)) is worker) == follows
    decode.policy.left(worker)
    assert len(decode.policy._latest_of_prompt) == 1 + (not follows)


def test_a_task_goes_to_a_worker_with_its_adapter_though_its_prompt_is_elsewhere(roster_with_adapter):
    pool, adapter = roster_with_adapter
    d0, d1, d2 = pool
    task = job_of("", shared_prompt=1, adapter=adapter)
    pool.policy.placed(task, d2)
    assert next(worker for worker in pool.policy.best(task) if worker.has(adapter)) is d0
    pool.policy.placed(task, d1)
    assert next(pool.policy.best(task)) is d1, "d2, which has no adapter, has fewer requests"


@pytest.fixture
def roster_with_adapter(decode, make_report):
    """The pool, and an adapter of its first two workers, which are busy."""
    for worker, running in zip(decode, (8, 9, 0), strict=True):
        report = make_report(credits=100, running=running)
        if running:
            report.adapters.adapters.add(name="judge", digest="1" * 64)
        decode.report(worker, report, 0.0)
    return decode, decode.adapters.get("judge")

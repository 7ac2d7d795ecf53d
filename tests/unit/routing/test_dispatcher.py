"""Tests the dispatcher: the order of requests, placement, retries, refusals, fairness between keys, absent stages."""

from dataclasses import replace
from functools import partial

import pytest
from jobs import make_job

from overfill.errors import ModelNotFound, Overloaded, PromptTooLong, Unavailable
from overfill.routing.dispatcher import Dispatcher, Placement, Rejection
from overfill.routing.fair_queue import FairQueue
from overfill.routing.invariant import check
from overfill.routing.job import JobState
from overfill.routing.policy import LeastLoad
from overfill.routing.pool import Roster
from overfill.routing.reservations import RESERVE_TIMEOUT, SILENT_AFTER
from overfill.routing.tier import DEFAULT_TIER, Tier
from overfill.routing.worker import PREFILL, STALE_AFTER
from overfill.v1 import common_pb2, registry_pb2


@pytest.fixture
def roster():
    return Roster()


@pytest.fixture
def dispatcher(roster):
    return Dispatcher(roster, max_queue=3, claim_after=5.0, absent_after=10.0)


@pytest.fixture
def add(roster, add_worker):
    """Returns a function that adds a worker to the roster and gives its first report."""
    return partial(add_worker, roster)


def job(name, prompt=10, answer=10, **more):
    return make_job(name, prompt, answer, **more)


def placed(outcomes):
    return [(o.job.id, o.worker.id) for o in outcomes if isinstance(o, Placement)]


def place(dispatcher, now, *jobs):
    """Submits jobs and returns the placements that follow."""
    for each in jobs:
        dispatcher.submit(each, now)
    return placed(dispatcher.poll(now))


def reserve(dispatcher, *jobs):
    """Lets the decode workers reserve blocks at time 0 and returns the placements that follow."""
    for each in jobs:
        dispatcher.reserved(each)
    return placed(dispatcher.poll(0.0))


def test_a_request_takes_a_decode_worker_then_a_prefill_slot(dispatcher, add):
    decode, prefill = add("d0"), add("p0", PREFILL)
    a = job("a")
    assert place(dispatcher, 0.0, a) == [("a", "d0")]
    assert (decode.in_flight, prefill.in_flight) == (1, 0), "no prefill slot is held while blocks are reserved"
    assert reserve(dispatcher, a) == [("a", "p0")]
    dispatcher.prefill_done(a)
    assert (decode.in_flight, prefill.in_flight) == (1, 0)
    dispatcher.finish(a)
    assert (decode.in_flight, prefill.in_flight, dispatcher.num_jobs) == (0, 0, 0)


def test_a_free_prefill_slot_goes_with_the_start(dispatcher, add):
    decode, prefill = add("d0"), add("p0", PREFILL)
    a, b = job("a"), job("b")
    place(dispatcher, 0.0, a, b)
    assert dispatcher.prefill_with_start(a) is prefill
    assert dispatcher.prefill_with_start(a) is None, "it holds a slot already"
    check(dispatcher, 0.0)
    assert dispatcher.reserved(a), "no second slot is needed"
    assert a.state is JobState.RUNNING
    assert dispatcher.prefill_with_start(b) is prefill
    dispatcher.refused(b)
    assert (decode.in_flight, prefill.in_flight) == (1, 1), "a refusal frees the slot"
    check(dispatcher, 0.0)


@pytest.mark.parametrize("with_start", [True, False])
def test_a_job_whose_decode_worker_has_the_prompt_holds_and_awaits_no_prefill_slot(dispatcher, add, with_start):
    add("d0")
    prefill = add("p0", PREFILL, credits=1)
    a, b = job("a"), job("b")
    place(dispatcher, 0.0, a)
    if with_start:
        assert dispatcher.prefill_with_start(a) is prefill
    assert dispatcher.reserved(a, has_prompt=True)
    assert (a.state, prefill.in_flight) == (JobState.RUNNING, 0)
    place(dispatcher, 0.0, b)
    assert reserve(dispatcher, b) == [("b", "p0")]
    dispatcher.prefill_done(b, 0.0)
    dispatcher.need_prefill(a, None, failed=False, pause=False)  # the transfer that it awaited has failed
    assert placed(dispatcher.poll(0.0)) == [("a", "p0")]
    check(dispatcher, 0.0)


def test_no_slot_goes_with_the_start_while_a_resumed_job_waits_for_one(dispatcher, add):
    add("d0")
    p0 = add("p0", PREFILL, credits=2)
    a, b = job("a", prompt=10), job("b")
    place(dispatcher, 0.0, a)
    reserve(dispatcher, a)
    place(dispatcher, 0.0, b)
    dispatcher.need_prefill(a, p0, failed=False, pause=True)
    dispatcher.poll(0.0)
    assert a.state is JobState.WANTS_PREFILL
    p0.paused_until_report = False
    assert dispatcher.prefill_with_start(b) is None
    dispatcher.reserved(b)
    assert b.state is JobState.WANTS_PREFILL


def test_a_start_takes_no_slot_that_a_job_with_blocks_needs(roster, dispatcher, add):
    add("d0")
    p0 = add("p0", PREFILL, credits=2)
    a, b = job("a"), job("b")
    place(dispatcher, 0.0, a, b)
    roster.prefill.place(p0, 1)  # one slot is left for two jobs
    assert dispatcher.prefill_with_start(b) is None
    assert reserve(dispatcher, a) == [("a", "p0")]


@pytest.fixture
def two_tiers(add_worker):
    """A dispatcher of the tiers a and b with a decode worker each, and a function that makes all workers report."""
    roster = Roster(tiers=[Tier("a"), Tier("b")])
    for name in "ab":
        add_worker(roster, name, tier=name)
    add_worker(roster, "p0", PREFILL, credits=2)

    def report(now):
        for worker in roster.workers():
            keep_reporting(roster, worker.id, now)

    return Dispatcher(roster), report


@pytest.mark.parametrize("with_start", [False, True])
@pytest.mark.parametrize("compiles", [False, True])
def test_a_decode_worker_that_does_not_answer_keeps_no_prefill_slots_from_other_tiers(two_tiers, with_start, compiles):
    dispatcher, report = two_tiers
    stuck = [job(f"stuck{index}", tier="a", compiles=compiles) for index in range(2)]
    assert len(place(dispatcher, 0.0, *stuck)) == 2
    if with_start:
        assert [dispatcher.prefill_with_start(each) is not None for each in stuck] == [not compiles] * 2
    assert place(dispatcher, 0.4, job("other", tier="b")) == []
    report(RESERVE_TIMEOUT)
    assert placed(dispatcher.poll(RESERVE_TIMEOUT)) == [("other", "b")]
    check(dispatcher, RESERVE_TIMEOUT)


def test_a_late_reservation_counts_on_the_prefill_worker_to_which_its_decode_worker_turns(two_tiers):
    dispatcher, report = two_tiers
    late, others = job("late", tier="a"), [job(f"other{index}", tier="b") for index in range(2)]
    place(dispatcher, 0.0, late)
    p0 = dispatcher.prefill_with_start(late)
    report(1.0)
    place(dispatcher, 1.0, *others)
    assert all(dispatcher.prefill_with_start(each) is p0 for each in others), "the slot is free again"
    assert dispatcher.reserved(late), "the decode worker has its assignment"
    assert (late.state, late.prefill, p0.in_flight) == (JobState.RUNNING, p0, 3)
    check(dispatcher, 1.0)
    for each in (late, *others):
        dispatcher.finish(each)
    assert p0.in_flight == 0


@pytest.mark.parametrize("refuses", [False, True])
def test_a_decode_worker_that_answers_nothing_gets_no_more_until_it_answers(two_tiers, refuses):
    dispatcher, report = two_tiers
    stuck, next_job = job("stuck", tier="a"), job("next", tier="a")
    place(dispatcher, 0.0, stuck)
    report(SILENT_AFTER)
    assert place(dispatcher, SILENT_AFTER, next_job) == []
    for now in (4.0, 5.0):  # reports do not end it
        report(now)
        assert dispatcher.poll(now) == []
    check(dispatcher, 5.0)
    if refuses:
        dispatcher.refused(stuck)
        dispatcher.finish(stuck)
    else:
        dispatcher.reserved(stuck)
    report(6.0)
    assert ("next", "a") in placed(dispatcher.poll(6.0))


def test_no_decode_worker_is_assigned_while_no_prefill_slot_would_be_free(roster, dispatcher, add):
    decode = add("d0")
    prefill = add("p0", PREFILL, credits=1)
    a, b = job("a"), job("b")
    assert place(dispatcher, 0.0, a, b) == [("a", "d0")], "the only slot is reserved for a"
    assert dispatcher.queued(roster.prefill) == 1
    assert reserve(dispatcher, a) == [("a", "p0")]
    assert (decode.in_flight, prefill.in_flight) == (1, 1)
    dispatcher.prefill_done(a)
    assert placed(dispatcher.poll(0.0)) == [("b", "d0")]


def test_a_request_that_its_client_resumes_waits_its_turn(dispatcher, add):
    add("p0", PREFILL)
    dispatcher.submit(job("new", prompt=10, key="a"), 0.0)
    dispatcher.submit(job("begun", priority=1, emitted=1, key="b"), 0.0)
    dispatcher.submit(job("begun too", emitted=1, key="a"), 0.0)
    dispatcher.submit(job("another", key="c"), 0.0)
    add("d0", credits=4)
    assert [name for name, _ in placed(dispatcher.poll(1.0))] == ["new", "another", "begun too", "begun"]


def test_clients_may_resume_into_a_full_queue_up_to_twice_its_length(dispatcher, add):
    add("p0", PREFILL)
    for name in "abc":
        dispatcher.submit(job(name), 0.0)
    for name in "def":
        dispatcher.submit(job(name, emitted=1), 0.0)
    with pytest.raises(Overloaded, match="6 requests are waiting"):
        dispatcher.submit(job("g", emitted=1), 0.0)


def test_a_refused_request_goes_to_the_front_and_the_worker_is_left_alone_until_it_reports(
    roster, dispatcher, add, make_report
):
    add("p0", PREFILL)
    worker = add("d0", credits=1)
    a, b = job("a"), job("b")
    place(dispatcher, 0.0, a, b)
    dispatcher.refused(a)
    assert dispatcher.poll(0.1) == []
    assert worker.in_flight == 0
    roster.decode[DEFAULT_TIER].report(worker, make_report(credits=1), 0.2)
    assert placed(dispatcher.poll(0.2)) == [("a", "d0")]


def test_the_worker_that_failed_is_tried_again_when_there_is_no_other(dispatcher, add):
    add("p0", PREFILL)
    add("d0")
    a = job("a")
    place(dispatcher, 0.0, a)
    dispatcher.lost(a, 0.0, gone=False)
    assert placed(dispatcher.poll(0.0)) == [("a", "d0")]


def test_a_vanished_worker_gets_nothing_until_it_reports(roster, dispatcher, add, make_report):
    add("p0", PREFILL)
    worker = add("d0")
    a = job("a")
    place(dispatcher, 0.0, a)
    dispatcher.lost(a, 0.0, gone=True)
    assert place(dispatcher, 0.0, job("b")) == []
    roster.decode[DEFAULT_TIER].report(worker, make_report(), 1.0)
    assert placed(dispatcher.poll(1.0)) == [("a", "d0"), ("b", "d0")]


def test_a_failed_prefill_goes_to_another_worker_before_new_requests(dispatcher, add, make_report):
    add("d0")
    p0 = add("p0", PREFILL, credits=1)
    p1 = add("p1", PREFILL, credits=1, queued_tokens=5)
    a, b = job("a"), job("b")
    place(dispatcher, 0.0, a, b)
    assert reserve(dispatcher, a, b) == [("a", "p0"), ("b", "p1")]
    dispatcher.need_prefill(a, p0, failed=True, pause=False)
    assert dispatcher.poll(0.0) == [], "p1 is alive, so a waits for it instead of trying p0 again"
    dispatcher.prefill_done(b)
    assert placed(dispatcher.poll(0.0)) == [("a", "p1")]
    dispatcher.need_prefill(a, p1, failed=True, pause=True)
    assert placed(dispatcher.poll(0.0)) == [("a", "p0")], "every worker has failed it, so it may go to any"


@pytest.fixture
def both(roster, make_info, make_report):
    """A worker with both stages, in the prefill and in the decode pool."""

    def add(name, **report):
        decode = replace(make_info(name), colocated=True)
        workers = roster.join_all([replace(decode, stage=PREFILL), decode])
        for worker in workers:
            roster.pool_of(worker).report(worker, make_report(**report), 0.0)
        return workers

    return add


def test_a_worker_with_both_stages_serves_alone_and_needs_one_place_of_each_stage(roster, dispatcher, both):
    prefill, decode = both("b", credits=1)
    a, b = job("a"), job("b")
    assert place(dispatcher, 0.0, a, b) == [("a", "b")]
    assert dispatcher.prefill_with_start(a) is prefill
    assert (prefill.in_flight, decode.in_flight) == (1, 1)
    dispatcher.reserved(a)
    dispatcher.prefill_done(a, 0.0)
    assert (prefill.in_flight, decode.in_flight) == (0, 1)
    dispatcher.finish(a)
    assert placed(dispatcher.poll(0.0)) == [("b", "b")]
    check(dispatcher, 0.0)


def test_a_failed_stage_does_not_bar_the_other_one_and_a_vanished_worker_bars_both(dispatcher, add, both):
    prefill, decode = both("b")
    add("p0", PREFILL, queued_tokens=50)
    a = job("a")
    place(dispatcher, 0.0, a)
    assert reserve(dispatcher, a) == [("a", "b")]
    dispatcher.need_prefill(a, prefill, failed=True, pause=True)
    assert placed(dispatcher.poll(0.0)) == [("a", "p0")]
    assert not prefill.admissible(0.0)
    assert decode.admissible(0.0)
    dispatcher.lost(a, 0.0, gone=False)
    assert a.avoid == {prefill.seat, decode.seat}
    b = job("b")
    place(dispatcher, 0.0, b)
    dispatcher.lost(b, 0.0, gone=True)
    assert b.avoid == {prefill.seat, decode.seat}
    assert not decode.admissible(0.0)


def test_a_draining_worker_with_both_stages_keeps_the_requests_that_it_prefills_itself(roster, add, both, make_report):
    dispatcher = Dispatcher(roster, absent_after=5.0)
    workers = both("b")
    a = job("a")
    place(dispatcher, 0.0, a)
    for now in (0.0, 6.0, 12.0):
        for worker in workers:
            roster.pool_of(worker).report(worker, make_report(draining=True), now)
        if not now:
            dispatcher.reserved(a)
        assert dispatcher.poll(now) == [], "no other worker prefills, and it needs none"
    dispatcher.prefill_done(a, 12.0)
    assert dispatcher.num_waiting == 0
    add("p0", PREFILL, now=12.0)
    assert dispatcher.poll(12.0) == [], "the token has ended the wait for a prefill slot"
    check(dispatcher, 12.0)


def test_a_full_queue_refuses_new_requests_but_takes_resumed_ones_back(dispatcher, add):
    add("p0", PREFILL)
    add("d0", credits=1)
    running = job("running")
    place(dispatcher, 0.0, running)
    for name in "abc":
        dispatcher.submit(job(name), 0.0)
    with pytest.raises(Overloaded, match="3 requests are waiting"):
        dispatcher.submit(job("d"), 0.0)
    dispatcher.lost(running, 0.0, gone=True)
    assert running.state is JobState.WAITING


def test_one_key_never_fills_the_queue(roster, add):
    dispatcher = Dispatcher(roster, max_queue=8)
    add("p0", PREFILL)
    add("d0", credits=0)
    for index in range(4):
        dispatcher.submit(job(f"a{index}", key="a"), 0.0)
    with pytest.raises(Overloaded, match="4 requests of this API key are waiting, and 4 places of 8 are free"):
        dispatcher.submit(job("a4", key="a"), 0.0)
    for index in range(2):
        dispatcher.submit(job(f"b{index}", key="b"), 0.0)
    with pytest.raises(Overloaded, match="2 requests of this API key"):
        dispatcher.submit(job("b2", key="b"), 0.0)
    dispatcher.submit(job("c", key="c"), 0.0)
    dispatcher.submit(job("no key 0"), 0.0)
    with pytest.raises(Overloaded, match="8 requests are waiting"):
        dispatcher.submit(job("no key"), 0.0)


@pytest.mark.parametrize(
    ("prompt", "answer", "field"),
    [(200, 10, "prompt"), (100, 61, "sampling.max_tokens")],
)
def test_a_request_larger_than_every_worker_is_refused_at_once(dispatcher, add, prompt, answer, field):
    add("p0", PREFILL, total=1000)
    add("d0", total=10)
    with pytest.raises(PromptTooLong) as caught:
        dispatcher.submit(job("a", prompt=prompt, answer=answer), 0.0)
    assert caught.value.field == field
    assert str(prompt + answer) in str(caught.value)
    assert "160" in str(caught.value)


def test_a_request_that_fits_only_one_worker_waits_for_that_one(roster, dispatcher, add, make_report):
    add("p0", PREFILL)
    add("small", total=2)
    large = add("large", total=100, used=99)
    assert place(dispatcher, 0.0, job("a", prompt=60)) == []
    roster.decode[DEFAULT_TIER].report(large, make_report(), 0.0)
    assert placed(dispatcher.poll(0.0)) == [("a", "large")]


def test_small_requests_pass_a_blocked_one_until_it_has_waited_too_long(roster, dispatcher, add, make_report):
    add("p0", PREFILL)
    worker = add("d0", used=95, total=100)
    add("tiny", total=3)
    dispatcher.submit(job("large", prompt=500, answer=500), 0.0)
    b = job("b", prompt=40)
    assert place(dispatcher, 1.0, b) == [("b", "d0")]
    dispatcher.finish(b)
    roster.decode[DEFAULT_TIER].report(worker, make_report(used=90, total=100), 5.0)
    roster.decode[DEFAULT_TIER].report(roster.decode[DEFAULT_TIER].get("tiny"), make_report(total=3), 5.0)
    roster.prefill.report(roster.prefill.get("p0"), make_report(), 5.0)
    assert place(dispatcher, 5.0, job("c", prompt=40), job("d", prompt=8)) == [("d", "tiny")], (
        "d0 is kept for the large one; tiny would not fit it"
    )
    roster.decode[DEFAULT_TIER].remove(roster.find("tiny"))
    assert place(dispatcher, 5.0, job("e", prompt=8)) == []
    roster.decode[DEFAULT_TIER].report(worker, make_report(used=10, total=100), 6.0)
    assert placed(dispatcher.poll(6.0)) == [("large", "d0"), ("c", "d0"), ("e", "d0")]


def test_requests_are_rejected_when_a_stage_stays_empty(dispatcher, add):
    add("d0", now=0.0)
    a = job("a")
    assert place(dispatcher, 0.0, a) == []
    assert dispatcher.poll(9.9) == []
    [rejection] = dispatcher.poll(10.0)
    assert isinstance(rejection, Rejection)
    assert isinstance(rejection.error, Unavailable)
    assert "prefill" in str(rejection.error)
    assert dispatcher.num_jobs == 0


def keep_reporting(roster, name, now):
    """Makes the named worker repeat its last report at ``now``."""
    worker = roster.find(name)
    roster.pool_of(worker).report(worker, worker.report, now)


@pytest.mark.parametrize(
    ("startups", "absent_after", "patience"),
    [
        ((), None, 10.0),
        ((2.0,), None, 10.0),
        ((60.0,), None, 120.0),
        ((5.0, 60.0, 40.0), None, 120.0),
        ((5000.0, *[20.0] * 8), None, 40.0),  # one exceptional start, some time ago
        ((60.0,), 3.0, 3.0),
        ((2.0,), 300.0, 300.0),
    ],
)
def test_a_lost_worker_is_waited_for_as_long_as_another_takes_to_start(
    roster, add, make_info, startups, absent_after, patience
):
    dispatcher = Dispatcher(roster, absent_after=absent_after)
    add("p0", PREFILL)
    for incarnation, seconds in enumerate(startups):
        info = replace(make_info("d0", incarnation=incarnation), startup_seconds=seconds)
        roster.decode[DEFAULT_TIER].remove(roster.join(info))
    assert place(dispatcher, 0.0, job("a")) == []
    keep_reporting(roster, "p0", patience - 0.1)
    assert dispatcher.poll(patience - 0.1) == []
    keep_reporting(roster, "p0", patience)
    [rejection] = dispatcher.poll(patience)
    assert str(rejection.error) == f"no decode worker has reported for {patience:.0f} s"


def test_a_worker_that_joins_again_and_again_does_not_hide_how_long_others_take(roster, add, make_info):
    dispatcher = Dispatcher(roster)
    add("p0", PREFILL)
    roster.decode[DEFAULT_TIER].remove(roster.join(replace(make_info("slow"), startup_seconds=60.0)))
    for _ in range(20):
        roster.decode[DEFAULT_TIER].remove(roster.join(replace(make_info("quick"), startup_seconds=5.0)))
    assert place(dispatcher, 0.0, job("a")) == []
    keep_reporting(roster, "p0", 119.9)
    assert dispatcher.poll(119.9) == []


def test_how_long_one_stage_takes_to_start_says_nothing_of_the_other(roster, add, make_info):
    dispatcher = Dispatcher(roster)
    add("d0")
    roster.join(replace(make_info("d1"), startup_seconds=60.0))
    assert place(dispatcher, 0.0, job("a")) == []
    [rejection] = dispatcher.poll(10.0)
    assert "prefill" in str(rejection.error)


@pytest.mark.parametrize("silent", ["p0", "d0"])
def test_a_stage_whose_workers_are_joined_and_silent_is_absent(roster, dispatcher, add, silent):
    """The process hangs, but its transport still answers pings, so the stream stays open."""
    add("p0", PREFILL)
    add("d0")
    other = "d0" if silent == "p0" else "p0"
    dispatcher.poll(STALE_AFTER)
    keep_reporting(roster, other, STALE_AFTER + 1.0)
    dispatcher.submit(job("a"), STALE_AFTER + 1.0)
    assert dispatcher.poll(STALE_AFTER + 1.0) == []
    keep_reporting(roster, other, STALE_AFTER + 10.9)
    assert dispatcher.poll(STALE_AFTER + 10.9) == []
    keep_reporting(roster, other, STALE_AFTER + 11.0)
    [rejection] = dispatcher.poll(STALE_AFTER + 11.0)
    stage = "prefill" if silent == "p0" else "decode"
    assert str(rejection.error) == f"no {stage} worker has reported for 10 s"
    assert dispatcher.num_jobs == 0


def test_a_silent_worker_that_reports_in_time_takes_the_jobs_that_waited(roster, dispatcher, add):
    add("p0", PREFILL)
    add("d0")
    assert place(dispatcher, 5.0, job("a")) == []
    for name in ("p0", "d0"):
        keep_reporting(roster, name, 14.0)
    assert placed(dispatcher.poll(14.0)) == [("a", "d0")]
    assert place(dispatcher, 20.0, job("b")) == [], "the time counts from the start of the last silence"


def test_a_router_that_was_stopped_itself_waits_for_reports_before_it_rejects(dispatcher, add):
    add("p0", PREFILL)
    add("d0", credits=0)
    assert place(dispatcher, 0.0, job("a")) == []
    assert dispatcher.poll(500.0) == []


@pytest.mark.parametrize("has_reported", [False, True])
def test_a_worker_that_is_not_ready_yet_is_waited_for(roster, dispatcher, add, make_info, has_reported):
    if has_reported:
        add("d0", ready=False)
    else:
        roster.join(make_info("d0"))
    add("p0", PREFILL)
    assert place(dispatcher, 0.0, job("a")) == []
    keep_reporting(roster, "p0", 100.0)
    assert dispatcher.poll(100.0) == []


def test_a_smaller_priority_goes_first_and_queues_of_priorities_fill_apart(dispatcher, add):
    add("p0", PREFILL)
    for name in "abc":
        dispatcher.submit(job(name), 0.0)
    with pytest.raises(Overloaded):
        dispatcher.submit(job("d"), 0.0)
    dispatcher.submit(job("urgent", priority=-1), 0.0)
    dispatcher.submit(job("idle", priority=1), 0.0)
    add("d0", credits=9)
    assert [name for name, _ in placed(dispatcher.poll(0.0))] == ["urgent", "a", "b", "c"], "4 prefill slots"


def test_keys_take_turns_by_the_tokens_they_ask_for(roster, add):
    dispatcher = Dispatcher(roster, max_queue=100)
    add("p0", PREFILL, credits=100, total=1000)
    for index in range(6):
        dispatcher.submit(job(f"greedy{index}", prompt=90, key="greedy"), 0.0)
    for index in range(3):
        dispatcher.submit(job(f"modest{index}", prompt=30, answer=10, key="modest"), 0.0)
    worker = add("d0", credits=4, total=1000)
    assert worker.credits_left == 4
    names = [name for name, _ in placed(dispatcher.poll(0.0))]
    assert names == ["greedy0", "modest0", "modest1", "modest2"]


def test_tokens_that_a_key_did_not_use_are_refunded(roster, add):
    dispatcher = Dispatcher(roster, max_queue=100)
    add("p0", PREFILL, credits=100, total=10000)
    worker = add("d0", credits=1, total=10000)
    first = job("first", prompt=10, answer=1000, key="a")
    place(dispatcher, 0.0, first)
    reserve(dispatcher, first)
    first.emitted = 5
    dispatcher.submit(job("b", prompt=100, answer=10, key="b"), 0.0)
    dispatcher.submit(job("b2", prompt=100, answer=10, key="b"), 0.0)
    dispatcher.finish(first)
    assert place(dispatcher, 0.0, job("a2", prompt=10, answer=10, key="a")) == [("b", "d0")]
    assert worker.credits_left == 0
    assert [j.id for j in dispatcher.waiting()] == ["a2", "b2"], "15 tokens used, not 1010"


@pytest.mark.parametrize(
    ("prefilled", "order"),
    [("with the start", "b b2 a2"), ("after the reservation", "b b2 a2"), ("never", "b a2 b2")],
)
def test_a_prompt_is_refunded_to_a_client_that_leaves_only_if_it_was_never_prefilled(roster, add, prefilled, order):
    dispatcher = Dispatcher(roster, max_queue=100)
    add("p0", PREFILL, credits=100, total=10000)
    add("d0", credits=1, total=10000)
    leaver = job("leaver", prompt=1000, key="a")
    place(dispatcher, 0.0, leaver, job("b", prompt=100, key="b"), job("b2", prompt=100, key="b"))
    if prefilled != "after the reservation":
        assert dispatcher.prefill_with_start(leaver) is not None
    if prefilled == "never":
        dispatcher.refused(leaver)
    else:
        reserve(dispatcher, leaver)
        assert leaver.state is JobState.RUNNING
    dispatcher.finish(leaver)
    dispatcher.submit(job("a2", prompt=100, key="a"), 0.0)
    assert [j.id for j in dispatcher.waiting()] == order.split()


def test_a_key_is_refunded_no_more_than_it_was_charged(roster, add_worker):
    dispatcher = Dispatcher(roster, max_queue=100)
    for index in range(3):  # resumed by its client, and cancelled before its turn
        given_up = job(f"gone{index}", prompt=100, answer=1000, key="a", emitted=500)
        dispatcher.submit(given_up, 0.0)
        dispatcher.finish(given_up)
    dispatcher.submit(job("a", prompt=10, answer=20, key="a"), 0.0)
    dispatcher.submit(job("b", prompt=10, answer=10, key="b"), 0.0)
    dispatcher.submit(job("a2", prompt=10, answer=10, key="a"), 0.0)
    dispatcher.submit(job("b2", prompt=10, answer=10, key="b"), 0.0)
    assert [j.id for j in dispatcher.waiting()] == ["a", "b", "b2", "a2"], "as if the other requests had never existed"
    moved = FairQueue()
    moved_job = job("moved", key="a")
    moved_job.migrated = True
    moved.append(moved_job)
    assert moved_job.charged == 0, "so nothing can be refunded for it"


def drained(roster, dispatcher, add, make_report, per_second, until):
    """Runs a queue that ``per_second`` requests leave each second; returns the time at the end."""
    add("p0", PREFILL, credits=1000, total=10000)
    worker = add("d0", credits=1, total=10000)
    now, count = 0.0, 0
    dispatcher.submit(job("f0"), now)
    running = [o.job for o in dispatcher.poll(now)]
    for _ in range(until * per_second):
        while dispatcher.num_waiting < 3:
            count += 1
            dispatcher.submit(job(f"f{count}"), now)
        now += 1 / per_second
        dispatcher.finish(running.pop())
        roster.prefill.report(roster.prefill.get("p0"), make_report(credits=1000, total=10000), now)
        roster.decode[DEFAULT_TIER].report(worker, make_report(credits=1, total=10000), now)
        started = [o.job for o in dispatcher.poll(now)]
        for each in started:
            dispatcher.prefill_with_start(each)
            dispatcher.reserved(each)
        running += started
    return now


def test_a_deadline_that_cannot_be_met_is_refused_at_once_with_a_time_to_try_again(
    roster, dispatcher, add, make_report
):
    now = drained(roster, dispatcher, add, make_report, 4, 8)
    assert dispatcher.num_waiting == 2
    dispatcher.admit(DEFAULT_TIER, 0, "", now, now + 0.7)
    with pytest.raises(Overloaded, match="the deadline in 0") as caught:
        dispatcher.submit(job("late", deadline=now + 0.3), now)
    assert caught.value.retry_after == pytest.approx(0.2, abs=0.1)
    with pytest.raises(Overloaded, match="the deadline in 0"):
        dispatcher.admit(DEFAULT_TIER, 0, "", now, now + 0.3, client_resumes=True)
    dispatcher.admit(DEFAULT_TIER, -1, "", now, now + 0.3)  # no request is ahead of an urgent one


def test_a_full_queue_says_when_half_of_it_will_have_left(roster, dispatcher, add, make_report):
    now = drained(roster, dispatcher, add, make_report, 2, 8)
    dispatcher.submit(job("last"), now)
    with pytest.raises(Overloaded) as caught:
        dispatcher.submit(job("more"), now)
    assert caught.value.retry_after == pytest.approx(0.75, abs=0.3)


def test_a_placement_that_a_worker_refuses_does_not_make_the_queue_look_fast(roster, add, make_report):
    dispatcher = Dispatcher(roster, max_queue=100, max_wait=2.0)
    now = drained(roster, dispatcher, add, make_report, 4, 8)
    dispatcher.admit(DEFAULT_TIER, 0, "", now, None)
    worker = roster.find("d0")
    roster.decode[DEFAULT_TIER].release(worker)
    for _ in range(40):  # ten seconds in which the worker takes nothing
        now += 0.25
        roster.decode[DEFAULT_TIER].report(worker, make_report(credits=1, total=10000), now)
        roster.prefill.report(roster.find("p0"), make_report(credits=1000, total=10000), now)
        (outcome,) = dispatcher.poll(now)
        dispatcher.refused(outcome.job)
    with pytest.raises(Overloaded, match="the limit 2 s"):
        dispatcher.admit(DEFAULT_TIER, 0, "", now, None)
    dispatcher.admit(DEFAULT_TIER, 0, "", now, None, client_resumes=True)  # its answer survives a lost router


def test_idle_time_does_not_count_as_a_slow_queue(roster, dispatcher, add, make_report):
    now = drained(roster, dispatcher, add, make_report, 4, 8)
    for waiting in list(dispatcher.waiting()):
        dispatcher.finish(waiting)
    dispatcher.poll(now)
    now += 1000.0
    dispatcher.poll(now)
    dispatcher.submit(job("a"), now)
    dispatcher.poll(now)
    dispatcher.admit(DEFAULT_TIER, 0, "", now, now + 0.5)


def test_no_decision_looks_at_every_worker(roster, add):
    """Runs requests through pools of 300 workers; each decision reads a few workers at most."""
    dispatcher = Dispatcher(roster)
    for index in range(300):
        add(f"p{index}", PREFILL)
        add(f"d{index}")
    looks = []
    watched = type("Watched", (LeastLoad,), {"best": lambda self, job: looked(super(watched, self).best(job))})

    def looked(workers):
        for worker in workers:
            looks.append(worker)
            yield worker

    roster.decode[DEFAULT_TIER].use(watched())
    roster.prefill.use(watched())
    for index in range(20):
        each = job(str(index))
        place(dispatcher, 0.0, each)
        reserve(dispatcher, each)
        dispatcher.prefill_done(each, 0.0)
        dispatcher.finish(each)
    assert 0 < len(looks) <= 20 * 3


JUDGE, CODER = (common_pb2.Adapter(name=name, digest=digit * 64) for name, digit in (("judge", "1"), ("coder", "2")))


@pytest.fixture
def say(roster, make_report):
    """Returns a function with which a worker reports its adapters."""

    def report(worker, *adapters, now=0.0, **fields):
        message = make_report(**fields)
        message.adapters.adapters.extend(adapters)
        roster.pool_of(worker).report(worker, message, now)

    return report


def test_a_job_with_an_adapter_goes_only_to_a_worker_that_has_it(roster, dispatcher, add, say):
    add("p0", PREFILL, credits=9)
    for index in range(20):  # more than a placement tries in the policy's order
        worker = add(f"d{index:02}", running=index)
    say(worker, JUDGE, running=50, credits=1)
    first, second = (job(name, adapter=roster.adapters.get("judge")) for name in "ab")
    assert place(dispatcher, 0.0, first, second) == [("a", "d19")]
    assert place(dispatcher, 0.0, job("c")) == [("c", "d00")], "a job that waits for its adapter holds up no other"
    say(worker, JUDGE, credits=2)
    assert placed(dispatcher.poll(0.0)) == [("b", "d19")]
    dispatcher.lost(first, 0.0, gone=False)
    say(add("d20"), JUDGE)
    assert placed(dispatcher.poll(0.0)) == [("a", "d20")], "it migrates to another worker with the adapter"
    check(dispatcher, 0.0)


def test_a_blocked_job_claims_only_workers_that_have_its_adapter_and_each_adapter_claims_its_own(roster, add, say):
    dispatcher = Dispatcher(roster)
    add("p0", PREFILL, credits=9)
    both = add("d0")
    say(both, JUDGE, CODER, used=90)
    say(add("d2"), CODER, used=90)
    judge, coder = roster.adapters.get("judge"), roster.adapters.get("coder")
    large = [job("judge", 500, adapter=judge), job("coder", 600, adapter=coder)]
    assert place(dispatcher, 0.0, *large) == []
    report_all(roster, 6.0)
    small = [job("plain", 20), job("small judge", 20, adapter=judge), job("small coder", 20, adapter=coder)]
    assert place(dispatcher, 6.0, *small) == [], "both workers have room for them, but are claimed"
    add("d1", now=6.0)
    assert placed(dispatcher.poll(6.0)) == [("plain", "d1")], "a worker without the adapters is not"
    check(dispatcher, 6.0)
    say(both, JUDGE, CODER, used=64, now=6.0)
    assert placed(dispatcher.poll(6.0)) == [("judge", "d0")]
    check(dispatcher, 6.0)


def test_a_job_whose_adapter_is_unloaded_ends_at_once_and_one_whose_workers_left_after_a_while(
    roster, dispatcher, add, say
):
    add("p0", PREFILL)
    add("d0")
    worker = add("d1")
    say(worker, JUDGE, CODER, credits=0)
    jobs = [job(name, adapter=roster.adapters.get(name)) for name in ("judge", "coder")]
    assert place(dispatcher, 0.0, *jobs) == []
    say(worker, CODER, credits=0)
    (unloaded,) = dispatcher.poll(1.0)
    assert (unloaded.job, type(unloaded.error)) == (jobs[0], ModelNotFound)
    assert "the adapter 'judge' was unloaded or replaced while the request waited" in str(unloaded.error)
    roster.decode[DEFAULT_TIER].remove(worker)
    for now in (2.0, 11.9):
        report_all(roster, now)
        assert dispatcher.poll(now) == []
    report_all(roster, 12.0)
    (left,) = dispatcher.poll(12.0)
    assert (left.job, type(left.error)) == (jobs[1], Unavailable)
    assert "the decode workers with the adapter 'coder' left, and none has returned" in str(left.error)
    assert roster.adapters.known() == []
    check(dispatcher, 12.0)


def report_all(roster, now):
    for worker in roster.workers():
        roster.pool_of(worker).report(worker, registry_pb2.Report(load=worker.report.load, credits=4, ready=True), now)


def test_a_job_too_large_for_the_workers_with_its_adapter_is_refused(roster, dispatcher, add, say):
    add("p0", PREFILL)
    add("d0", total=1000)
    large, small = add("d1", total=500), add("d2", total=100)
    say(large, JUDGE, total=500, credits=0)
    say(small, JUDGE, total=100)
    judge = roster.adapters.get("judge")
    with pytest.raises(PromptTooLong, match="the largest decode worker with the adapter 'judge' holds 8000"):
        dispatcher.submit(job("a", answer=9000, adapter=judge), 0.0)
    assert place(dispatcher, 0.0, job("b", answer=7000, adapter=judge)) == []
    say(large, JUDGE, total=500, draining=True)
    (rejected,) = dispatcher.poll(0.0)
    assert "holds 1600: ask for fewer tokens" in str(rejected.error)

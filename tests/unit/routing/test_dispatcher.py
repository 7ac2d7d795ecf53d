"""Tests the dispatcher: the order of requests, placement, retries, refusals, fairness between keys, absent stages."""

import itertools
from dataclasses import replace
from typing import ClassVar

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from jobs import make_job

from overfill.errors import Overloaded, PromptTooLong, Unavailable
from overfill.kv.handshake import KvIdentity
from overfill.kv.spec import KvSpec, RopeSpec
from overfill.routing.dispatcher import Dispatcher, Job, JobState, Placement, Rejection
from overfill.routing.fair_queue import FairQueue
from overfill.routing.invariant import check
from overfill.routing.policies import POLICIES
from overfill.routing.policy import LeastLoad
from overfill.routing.pool import Roster
from overfill.routing.reservations import RESERVE_TIMEOUT, SILENCE, SILENT_AFTER
from overfill.routing.tier import DEFAULT_TIER, Tier
from overfill.routing.worker import DECODE, PREFILL, STALE_AFTER, WorkerInfo
from overfill.v1 import decode_pb2, registry_pb2


@pytest.fixture
def roster():
    return Roster()


@pytest.fixture
def dispatcher(roster):
    return Dispatcher(roster, max_queue=3, claim_after=5.0, absent_after=10.0)


def job(name, prompt=10, answer=10, **more):
    return make_job(name, prompt, answer, **more)


def placed(outcomes):
    return [(o.job.id, o.worker.id) for o in outcomes if isinstance(o, Placement)]


def test_a_request_takes_a_decode_worker_then_a_prefill_slot(roster, dispatcher, add_worker):
    decode, prefill = add_worker(roster, "d0"), add_worker(roster, "p0", PREFILL)
    a = job("a")
    dispatcher.submit(a, 0.0)
    assert placed(dispatcher.poll(0.0)) == [("a", "d0")]
    assert (decode.in_flight, prefill.in_flight) == (1, 0), "no prefill slot is held while blocks are reserved"
    dispatcher.reserved(a)
    assert placed(dispatcher.poll(0.0)) == [("a", "p0")]
    dispatcher.prefill_done(a)
    assert (decode.in_flight, prefill.in_flight) == (1, 0)
    dispatcher.finish(a)
    assert (decode.in_flight, prefill.in_flight, dispatcher.num_jobs) == (0, 0, 0)


def test_a_free_prefill_slot_goes_with_the_start(roster, dispatcher, add_worker):
    decode, prefill = add_worker(roster, "d0"), add_worker(roster, "p0", PREFILL)
    a, b = job("a"), job("b")
    for each in (a, b):
        dispatcher.submit(each, 0.0)
    dispatcher.poll(0.0)
    assert dispatcher.prefill_with_start(a) is prefill
    assert dispatcher.prefill_with_start(a) is None, "it holds a slot already"
    check(dispatcher, 0.0)
    assert dispatcher.reserved(a), "no second slot is needed"
    assert a.state is JobState.RUNNING
    assert dispatcher.prefill_with_start(b) is prefill
    dispatcher.refused(b)
    assert (decode.in_flight, prefill.in_flight) == (1, 1), "a refusal frees the slot"
    check(dispatcher, 0.0)


def test_no_slot_goes_with_the_start_while_a_resumed_job_waits_for_one(roster, dispatcher, add_worker):
    add_worker(roster, "d0")
    p0 = add_worker(roster, "p0", PREFILL, credits=2)
    a, b = job("a", prompt=10), job("b")
    dispatcher.submit(a, 0.0)
    dispatcher.poll(0.0)
    dispatcher.reserved(a)
    dispatcher.poll(0.0)
    dispatcher.submit(b, 0.0)
    dispatcher.poll(0.0)
    dispatcher.need_prefill(a, p0, failed=False, pause=True)
    dispatcher.poll(0.0)
    assert a.state is JobState.WANTS_PREFILL
    p0.paused_until_report = False
    assert dispatcher.prefill_with_start(b) is None
    dispatcher.reserved(b)
    assert b.state is JobState.WANTS_PREFILL


def test_a_start_takes_no_slot_that_a_job_with_blocks_needs(roster, dispatcher, add_worker):
    add_worker(roster, "d0")
    p0 = add_worker(roster, "p0", PREFILL, credits=2)
    a, b = job("a"), job("b")
    for each in (a, b):
        dispatcher.submit(each, 0.0)
    dispatcher.poll(0.0)
    roster.prefill.place(p0, 1)  # one slot is left for two jobs
    assert dispatcher.prefill_with_start(b) is None
    dispatcher.reserved(a)
    assert placed(dispatcher.poll(0.0)) == [("a", "p0")]


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


def place(dispatcher, now, *jobs):
    for each in jobs:
        dispatcher.submit(each, now)
    return placed(dispatcher.poll(now))


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


def test_a_late_reservation_without_a_prefill_worker_waits_for_a_slot(two_tiers):
    dispatcher, report = two_tiers
    late = job("late", tier="a")
    place(dispatcher, 0.0, late)
    report(1.0)
    dispatcher.poll(1.0)
    assert not dispatcher.reserved(late)
    assert placed(dispatcher.poll(1.0)) == [("late", "p0")]


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


def test_a_decode_worker_that_answered_nothing_is_tried_again(two_tiers):
    dispatcher, report = two_tiers
    stuck = job("stuck", tier="a")
    place(dispatcher, 0.0, stuck)
    report(SILENT_AFTER)
    dispatcher.poll(SILENT_AFTER)
    dispatcher.finish(stuck)  # its client has left, so that no answer will come
    report(SILENT_AFTER + SILENCE - 0.1)
    assert place(dispatcher, SILENT_AFTER + SILENCE - 0.1, job("next", tier="a")) == []
    dispatcher.poll(SILENT_AFTER + SILENCE)
    report(SILENT_AFTER + SILENCE)
    assert placed(dispatcher.poll(SILENT_AFTER + SILENCE)) == [("next", "a")]


@pytest.mark.parametrize("compiles", [False, True])
def test_one_late_reservation_does_not_make_a_decode_worker_silent(two_tiers, compiles):
    """The worker compiles a grammar for it, or has answered another request meanwhile."""
    dispatcher, report = two_tiers
    place(dispatcher, 0.0, job("late", tier="a", compiles=compiles))
    if not compiles:
        answered = job("answered", tier="a")
        place(dispatcher, 0.1, answered)
        dispatcher.reserved(answered)
    report(SILENT_AFTER)
    assert ("next", "a") in place(dispatcher, SILENT_AFTER, job("next", tier="a"))


def test_no_decode_worker_is_assigned_while_no_prefill_slot_would_be_free(roster, dispatcher, add_worker):
    decode = add_worker(roster, "d0")
    prefill = add_worker(roster, "p0", PREFILL, credits=1)
    a, b = job("a"), job("b")
    dispatcher.submit(a, 0.0)
    dispatcher.submit(b, 0.0)
    assert placed(dispatcher.poll(0.0)) == [("a", "d0")], "the only slot is reserved for a"
    dispatcher.reserved(a)
    assert placed(dispatcher.poll(0.0)) == [("a", "p0")]
    assert (decode.in_flight, prefill.in_flight) == (1, 1)
    dispatcher.prefill_done(a)
    assert placed(dispatcher.poll(0.0)) == [("b", "d0")]


def test_waiting_requests_are_served_in_order(roster, dispatcher, add_worker):
    add_worker(roster, "p0", PREFILL)
    for name in "abc":
        dispatcher.submit(job(name), 0.0)
    assert dispatcher.poll(0.0) == []
    add_worker(roster, "d0")
    assert placed(dispatcher.poll(0.0)) == [("a", "d0"), ("b", "d0"), ("c", "d0")]


def test_a_request_that_its_client_resumes_waits_its_turn(roster, dispatcher, add_worker):
    add_worker(roster, "p0", PREFILL)
    dispatcher.submit(job("new", prompt=10, key="a"), 0.0)
    dispatcher.submit(job("begun", priority=1, emitted=1, key="b"), 0.0)
    dispatcher.submit(job("begun too", emitted=1, key="a"), 0.0)
    dispatcher.submit(job("another", key="c"), 0.0)
    add_worker(roster, "d0", credits=4)
    assert [name for name, _ in placed(dispatcher.poll(1.0))] == ["new", "another", "begun too", "begun"]


def test_clients_may_resume_into_a_full_queue_up_to_twice_its_length(roster, dispatcher, add_worker):
    add_worker(roster, "p0", PREFILL)
    for name in "abc":
        dispatcher.submit(job(name), 0.0)
    for name in "def":
        dispatcher.submit(job(name, emitted=1), 0.0)
    with pytest.raises(Overloaded, match="6 requests are waiting"):
        dispatcher.submit(job("g", emitted=1), 0.0)


def test_a_refused_request_goes_to_the_front_and_the_worker_is_left_alone_until_it_reports(
    roster, dispatcher, add_worker, make_report
):
    add_worker(roster, "p0", PREFILL)
    worker = add_worker(roster, "d0", credits=1)
    a, b = job("a"), job("b")
    dispatcher.submit(a, 0.0)
    dispatcher.submit(b, 0.0)
    dispatcher.poll(0.0)
    dispatcher.refused(a)
    assert dispatcher.poll(0.1) == []
    assert worker.in_flight == 0
    roster.decode[DEFAULT_TIER].report(worker, make_report(credits=1), 0.2)
    assert placed(dispatcher.poll(0.2)) == [("a", "d0")]


def test_a_refused_request_goes_to_another_worker_at_once(roster, dispatcher, add_worker):
    add_worker(roster, "p0", PREFILL)
    add_worker(roster, "d0")
    add_worker(roster, "d1", running=1)
    a = job("a")
    dispatcher.submit(a, 0.0)
    assert placed(dispatcher.poll(0.0)) == [("a", "d0")]
    dispatcher.refused(a)
    assert placed(dispatcher.poll(0.0)) == [("a", "d1")]


def test_a_lost_request_resumes_elsewhere_and_before_new_work(roster, dispatcher, add_worker):
    add_worker(roster, "p0", PREFILL)
    d0 = add_worker(roster, "d0")
    add_worker(roster, "d1", running=1, credits=1)
    a = job("a")
    dispatcher.submit(a, 0.0)
    dispatcher.poll(0.0)
    dispatcher.reserved(a)
    dispatcher.poll(0.0)
    dispatcher.lost(a, 1.0, gone=False)
    dispatcher.submit(job("b"), 1.0)
    assert d0.in_flight == 0
    assert placed(dispatcher.poll(1.0)) == [("a", "d1"), ("b", "d0")]


def test_the_worker_that_failed_is_tried_again_when_there_is_no_other(roster, dispatcher, add_worker):
    add_worker(roster, "p0", PREFILL)
    add_worker(roster, "d0")
    a = job("a")
    dispatcher.submit(a, 0.0)
    dispatcher.poll(0.0)
    dispatcher.lost(a, 0.0, gone=False)
    assert placed(dispatcher.poll(0.0)) == [("a", "d0")]


def test_a_vanished_worker_gets_nothing_until_it_reports(roster, dispatcher, add_worker, make_report):
    add_worker(roster, "p0", PREFILL)
    worker = add_worker(roster, "d0")
    a = job("a")
    dispatcher.submit(a, 0.0)
    dispatcher.poll(0.0)
    dispatcher.lost(a, 0.0, gone=True)
    dispatcher.submit(job("b"), 0.0)
    assert dispatcher.poll(0.0) == []
    roster.decode[DEFAULT_TIER].report(worker, make_report(), 1.0)
    assert placed(dispatcher.poll(1.0)) == [("a", "d0"), ("b", "d0")]


def test_a_failed_prefill_goes_to_another_worker_before_new_requests(roster, dispatcher, add_worker, make_report):
    add_worker(roster, "d0")
    p0 = add_worker(roster, "p0", PREFILL, credits=1)
    p1 = add_worker(roster, "p1", PREFILL, credits=1, queued_tokens=5)
    a, b = job("a"), job("b")
    dispatcher.submit(a, 0.0)
    dispatcher.submit(b, 0.0)
    dispatcher.poll(0.0)
    dispatcher.reserved(a)
    dispatcher.reserved(b)
    assert placed(dispatcher.poll(0.0)) == [("a", "p0"), ("b", "p1")]
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
    dispatcher.submit(a, 0.0)
    dispatcher.submit(b, 0.0)
    assert placed(dispatcher.poll(0.0)) == [("a", "b")]
    assert dispatcher.prefill_with_start(a) is prefill
    assert (prefill.in_flight, decode.in_flight) == (1, 1)
    dispatcher.reserved(a)
    dispatcher.prefill_done(a, 0.0)
    assert (prefill.in_flight, decode.in_flight) == (0, 1)
    dispatcher.finish(a)
    assert placed(dispatcher.poll(0.0)) == [("b", "b")]
    check(dispatcher, 0.0)


def test_a_failed_stage_does_not_bar_the_other_one_and_a_vanished_worker_bars_both(
    roster, dispatcher, add_worker, both
):
    prefill, decode = both("b")
    add_worker(roster, "p0", PREFILL, queued_tokens=50)
    a = job("a")
    dispatcher.submit(a, 0.0)
    dispatcher.poll(0.0)
    dispatcher.reserved(a)
    assert placed(dispatcher.poll(0.0)) == [("a", "b")]
    dispatcher.need_prefill(a, prefill, failed=True, pause=True)
    assert placed(dispatcher.poll(0.0)) == [("a", "p0")]
    assert not prefill.admissible(0.0)
    assert decode.admissible(0.0)
    dispatcher.lost(a, 0.0, gone=False)
    assert a.avoid == {prefill.seat, decode.seat}
    b = job("b")
    dispatcher.submit(b, 0.0)
    dispatcher.poll(0.0)
    dispatcher.lost(b, 0.0, gone=True)
    assert b.avoid == {prefill.seat, decode.seat}
    assert not decode.admissible(0.0)


def test_a_token_ends_the_wait_for_a_prefill_slot(roster, dispatcher, add_worker, both, make_report):
    """A draining worker with both stages prefills its own sequences without an assignment."""
    workers = both("b")
    a = job("a")
    dispatcher.submit(a, 0.0)
    dispatcher.poll(0.0)
    for worker in workers:
        roster.pool_of(worker).report(worker, make_report(draining=True), 0.0)
    dispatcher.reserved(a)
    assert dispatcher.poll(0.0) == []
    dispatcher.prefill_done(a, 0.0)
    assert dispatcher.num_waiting == 0
    add_worker(roster, "p0", PREFILL)
    assert dispatcher.poll(0.0) == []
    check(dispatcher, 0.0)


def test_a_worker_with_both_stages_may_answer_late(roster, dispatcher, both, make_report):
    """It answers after its step, which may be a long chunk of a prompt."""
    workers = both("b")
    a, b = job("a"), job("b")
    dispatcher.submit(a, 0.0)
    assert placed(dispatcher.poll(0.0)) == [("a", "b")]
    for now in (1.0, SILENT_AFTER + 1):
        for worker in workers:
            roster.pool_of(worker).report(worker, make_report(), now)
        dispatcher.poll(now)
    dispatcher.submit(b, SILENT_AFTER + 1)
    assert placed(dispatcher.poll(SILENT_AFTER + 1)) == [("b", "b")]


def test_a_draining_worker_with_both_stages_keeps_the_requests_that_it_prefills_itself(
    roster, add_worker, both, make_report
):
    dispatcher = Dispatcher(roster, absent_after=5.0)
    workers = both("b")
    a = job("a")
    dispatcher.submit(a, 0.0)
    dispatcher.poll(0.0)
    for now in (0.0, 6.0, 12.0):
        for worker in workers:
            roster.pool_of(worker).report(worker, make_report(draining=True), now)
        if not now:
            dispatcher.reserved(a)
        assert dispatcher.poll(now) == [], "no other worker prefills, and it needs none"
    dispatcher.prefill_done(a, 12.0)
    assert dispatcher.num_waiting == 0


def test_preempted_sequences_get_prefill_slots_before_new_ones(roster, dispatcher, add_worker):
    add_worker(roster, "d0")
    p0 = add_worker(roster, "p0", PREFILL, credits=2)
    a, b = job("a"), job("b")
    dispatcher.submit(a, 0.0)
    dispatcher.submit(b, 0.0)
    dispatcher.poll(0.0)
    dispatcher.reserved(a)
    dispatcher.poll(0.0)
    dispatcher.prefill_done(a)
    roster.prefill.place(p0, 1)
    roster.prefill.place(p0, 1)  # no slot for now
    dispatcher.reserved(b)
    dispatcher.need_prefill(a, p0, failed=False, pause=False)
    assert dispatcher.poll(0.0) == []
    roster.prefill.release(p0)
    assert placed(dispatcher.poll(0.0)) == [("a", "p0")]


def test_a_full_queue_refuses_new_requests_but_takes_resumed_ones_back(roster, dispatcher, add_worker):
    add_worker(roster, "p0", PREFILL)
    add_worker(roster, "d0", credits=1)
    running = job("running")
    dispatcher.submit(running, 0.0)
    dispatcher.poll(0.0)
    for name in "abc":
        dispatcher.submit(job(name), 0.0)
    with pytest.raises(Overloaded, match="3 requests are waiting"):
        dispatcher.submit(job("d"), 0.0)
    dispatcher.lost(running, 0.0, gone=True)
    assert running.state is JobState.WAITING


def test_one_key_never_fills_the_queue(roster, add_worker):
    dispatcher = Dispatcher(roster, max_queue=8)
    add_worker(roster, "p0", PREFILL)
    add_worker(roster, "d0", credits=0)
    for index in range(4):
        dispatcher.submit(job(f"a{index}", key="a"), 0.0)
    with pytest.raises(Overloaded, match="4 requests of this API key are waiting, and 4 places of 8 are free"):
        dispatcher.submit(job("a4", key="a"), 0.0)
    for index in range(2):
        dispatcher.submit(job(f"b{index}", key="b"), 0.0)
    with pytest.raises(Overloaded, match="2 requests of this API key"):
        dispatcher.submit(job("b2", key="b"), 0.0)
    dispatcher.submit(job("c", key="c"), 0.0)
    for index in range(1):
        dispatcher.submit(job(f"no key {index}"), 0.0)
    with pytest.raises(Overloaded, match="8 requests are waiting"):
        dispatcher.submit(job("no key"), 0.0)


@pytest.mark.parametrize(
    ("prompt", "answer", "field"),
    [(200, 10, "prompt"), (100, 61, "sampling.max_tokens")],
)
def test_a_request_larger_than_every_worker_is_refused_at_once(roster, dispatcher, add_worker, prompt, answer, field):
    add_worker(roster, "p0", PREFILL, total=1000)
    add_worker(roster, "d0", total=10)
    with pytest.raises(PromptTooLong) as caught:
        dispatcher.submit(job("a", prompt=prompt, answer=answer), 0.0)
    assert caught.value.field == field
    assert str(prompt + answer) in str(caught.value)
    assert "160" in str(caught.value)


def test_a_request_that_fits_only_one_worker_waits_for_that_one(roster, dispatcher, add_worker, make_report):
    add_worker(roster, "p0", PREFILL)
    add_worker(roster, "small", total=2)
    large = add_worker(roster, "large", total=100, used=99)
    dispatcher.submit(job("a", prompt=60), 0.0)
    assert dispatcher.poll(0.0) == []
    roster.decode[DEFAULT_TIER].report(large, make_report(), 0.0)
    assert placed(dispatcher.poll(0.0)) == [("a", "large")]


def test_small_requests_pass_a_blocked_one_until_it_has_waited_too_long(roster, dispatcher, add_worker, make_report):
    add_worker(roster, "p0", PREFILL)
    worker = add_worker(roster, "d0", used=95, total=100)
    add_worker(roster, "tiny", total=3)
    dispatcher.submit(job("large", prompt=500, answer=500), 0.0)
    b = job("b", prompt=40)
    dispatcher.submit(b, 1.0)
    assert placed(dispatcher.poll(1.0)) == [("b", "d0")]
    dispatcher.finish(b)
    roster.decode[DEFAULT_TIER].report(worker, make_report(used=90, total=100), 5.0)
    roster.decode[DEFAULT_TIER].report(roster.decode[DEFAULT_TIER].get("tiny"), make_report(total=3), 5.0)
    roster.prefill.report(roster.prefill.get("p0"), make_report(), 5.0)
    dispatcher.submit(job("c", prompt=40), 5.0)
    dispatcher.submit(job("d", prompt=8), 5.0)
    assert placed(dispatcher.poll(5.0)) == [("d", "tiny")], "d0 is kept for the large one; tiny would not fit it"
    roster.decode[DEFAULT_TIER].report(worker, make_report(used=10, total=100), 6.0)
    assert placed(dispatcher.poll(6.0)) == [("large", "d0"), ("c", "d0")]


def test_requests_are_rejected_when_a_stage_stays_empty(roster, dispatcher, add_worker):
    add_worker(roster, "d0", now=0.0)
    a = job("a")
    dispatcher.submit(a, 0.0)
    assert dispatcher.poll(0.0) == []
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
    roster, add_worker, make_info, startups, absent_after, patience
):
    dispatcher = Dispatcher(roster, absent_after=absent_after)
    add_worker(roster, "p0", PREFILL)
    for incarnation, seconds in enumerate(startups):
        info = replace(make_info("d0", incarnation=incarnation), startup_seconds=seconds)
        roster.decode[DEFAULT_TIER].remove(roster.join(info))
    dispatcher.submit(job("a"), 0.0)
    assert dispatcher.poll(0.0) == []
    keep_reporting(roster, "p0", patience - 0.1)
    assert dispatcher.poll(patience - 0.1) == []
    keep_reporting(roster, "p0", patience)
    [rejection] = dispatcher.poll(patience)
    assert str(rejection.error) == f"no decode worker has reported for {patience:.0f} s"


def test_a_worker_that_joins_again_and_again_does_not_hide_how_long_others_take(roster, add_worker, make_info):
    dispatcher = Dispatcher(roster)
    add_worker(roster, "p0", PREFILL)
    roster.decode[DEFAULT_TIER].remove(roster.join(replace(make_info("slow"), startup_seconds=60.0)))
    for _ in range(20):
        roster.decode[DEFAULT_TIER].remove(roster.join(replace(make_info("quick"), startup_seconds=5.0)))
    dispatcher.submit(job("a"), 0.0)
    assert dispatcher.poll(0.0) == []
    keep_reporting(roster, "p0", 119.9)
    assert dispatcher.poll(119.9) == []


def test_how_long_one_stage_takes_to_start_says_nothing_of_the_other(roster, add_worker, make_info):
    dispatcher = Dispatcher(roster)
    add_worker(roster, "d0")
    roster.join(replace(make_info("d1"), startup_seconds=60.0))
    dispatcher.submit(job("a"), 0.0)
    assert dispatcher.poll(0.0) == []
    [rejection] = dispatcher.poll(10.0)
    assert "prefill" in str(rejection.error)


@pytest.mark.parametrize("silent", ["p0", "d0"])
def test_a_stage_whose_workers_are_joined_and_silent_is_absent(roster, dispatcher, add_worker, silent):
    """The process hangs, but its transport still answers pings, so the stream stays open."""
    add_worker(roster, "p0", PREFILL)
    add_worker(roster, "d0")
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


def test_a_silent_worker_that_reports_in_time_takes_the_jobs_that_waited(roster, dispatcher, add_worker):
    add_worker(roster, "p0", PREFILL)
    add_worker(roster, "d0")
    dispatcher.submit(job("a"), 5.0)
    assert dispatcher.poll(5.0) == []
    for name in ("p0", "d0"):
        keep_reporting(roster, name, 14.0)
    assert placed(dispatcher.poll(14.0)) == [("a", "d0")]
    dispatcher.submit(job("b"), 20.0)
    assert dispatcher.poll(20.0) == [], "the time counts from the start of the last silence"


def test_a_router_that_was_stopped_itself_waits_for_reports_before_it_rejects(roster, dispatcher, add_worker):
    add_worker(roster, "p0", PREFILL)
    add_worker(roster, "d0", credits=0)
    dispatcher.submit(job("a"), 0.0)
    assert dispatcher.poll(0.0) == []
    assert dispatcher.poll(500.0) == []


@pytest.mark.parametrize("has_reported", [False, True])
def test_a_worker_that_is_not_ready_yet_is_waited_for(roster, dispatcher, add_worker, make_info, has_reported):
    if has_reported:
        add_worker(roster, "d0", ready=False)
    else:
        roster.join(make_info("d0"))
    add_worker(roster, "p0", PREFILL)
    dispatcher.submit(job("a"), 0.0)
    assert dispatcher.poll(0.0) == []
    keep_reporting(roster, "p0", 100.0)
    assert dispatcher.poll(100.0) == []


def test_a_smaller_priority_goes_first_and_queues_of_priorities_fill_apart(roster, dispatcher, add_worker):
    add_worker(roster, "p0", PREFILL)
    for name in "abc":
        dispatcher.submit(job(name), 0.0)
    with pytest.raises(Overloaded):
        dispatcher.submit(job("d"), 0.0)
    dispatcher.submit(job("urgent", priority=-1), 0.0)
    dispatcher.submit(job("idle", priority=1), 0.0)
    add_worker(roster, "d0", credits=9)
    assert [name for name, _ in placed(dispatcher.poll(0.0))] == ["urgent", "a", "b", "c"], "4 prefill slots"


def test_keys_take_turns_by_the_tokens_they_ask_for(roster, add_worker):
    dispatcher = Dispatcher(roster, max_queue=100)
    add_worker(roster, "p0", PREFILL, credits=100, total=1000)
    for index in range(6):
        dispatcher.submit(job(f"greedy{index}", prompt=90, key="greedy"), 0.0)
    for index in range(3):
        dispatcher.submit(job(f"modest{index}", prompt=30, answer=10, key="modest"), 0.0)
    worker = add_worker(roster, "d0", credits=4, total=1000)
    assert worker.credits_left == 4
    names = [name for name, _ in placed(dispatcher.poll(0.0))]
    assert names == ["greedy0", "modest0", "modest1", "modest2"]


def test_tokens_that_a_key_did_not_use_are_refunded(roster, add_worker):
    dispatcher = Dispatcher(roster, max_queue=100)
    add_worker(roster, "p0", PREFILL, credits=100, total=10000)
    worker = add_worker(roster, "d0", credits=1, total=10000)
    first = job("first", prompt=10, answer=1000, key="a")
    dispatcher.submit(first, 0.0)
    dispatcher.poll(0.0)
    dispatcher.reserved(first)
    dispatcher.poll(0.0)
    first.emitted = 5
    dispatcher.submit(job("b", prompt=100, answer=10, key="b"), 0.0)
    dispatcher.submit(job("b2", prompt=100, answer=10, key="b"), 0.0)
    dispatcher.finish(first)
    dispatcher.submit(job("a2", prompt=10, answer=10, key="a"), 0.0)
    assert placed(dispatcher.poll(0.0)) == [("b", "d0")]
    assert worker.credits_left == 0
    assert [j.id for j in dispatcher.waiting()] == ["a2", "b2"], "15 tokens used, not 1010"


@pytest.mark.parametrize("with_start", [False, True])
def test_a_prompt_that_was_prefilled_is_not_refunded_when_the_client_leaves_before_the_first_token(
    roster, add_worker, with_start
):
    dispatcher = Dispatcher(roster, max_queue=100)
    add_worker(roster, "p0", PREFILL, credits=100, total=10000)
    add_worker(roster, "d0", credits=1, total=10000)
    leaver = job("leaver", prompt=1000, key="a")
    dispatcher.submit(leaver, 0.0)
    dispatcher.submit(job("b", prompt=100, key="b"), 0.0)
    dispatcher.submit(job("b2", prompt=100, key="b"), 0.0)
    dispatcher.poll(0.0)
    if with_start:
        assert dispatcher.prefill_with_start(leaver) is not None
    dispatcher.reserved(leaver)
    dispatcher.poll(0.0)
    assert leaver.state is JobState.RUNNING
    dispatcher.finish(leaver)
    dispatcher.submit(job("a2", prompt=100, key="a"), 0.0)
    assert [j.id for j in dispatcher.waiting()] == ["b", "b2", "a2"]


def test_a_prompt_that_was_never_prefilled_is_refunded(roster, add_worker):
    dispatcher = Dispatcher(roster, max_queue=100)
    add_worker(roster, "p0", PREFILL, credits=100, total=10000)
    add_worker(roster, "d0", credits=1, total=10000)
    refused = job("refused", prompt=1000, key="a")
    dispatcher.submit(refused, 0.0)
    dispatcher.submit(job("b", prompt=100, key="b"), 0.0)
    dispatcher.submit(job("b2", prompt=100, key="b"), 0.0)
    dispatcher.poll(0.0)
    assert dispatcher.prefill_with_start(refused) is not None
    dispatcher.refused(refused)
    dispatcher.finish(refused)
    dispatcher.submit(job("a2", prompt=100, key="a"), 0.0)
    assert [j.id for j in dispatcher.waiting()] == ["b", "a2", "b2"]


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


def drained(roster, dispatcher, add_worker, make_report, per_second, until):
    """Runs a queue that ``per_second`` requests leave each second; returns the time at the end."""
    add_worker(roster, "p0", PREFILL, credits=1000, total=10000)
    worker = add_worker(roster, "d0", credits=1, total=10000)
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


@pytest.mark.parametrize("back", ["refused", "lost"])
def test_a_request_that_returns_after_the_only_large_worker_began_to_drain_is_refused(
    roster, dispatcher, add_worker, make_report, back
):
    add_worker(roster, "p0", PREFILL, total=1000)
    large = add_worker(roster, "d0", total=100)
    add_worker(roster, "d1", total=10)
    a = job("a", prompt=1000)
    dispatcher.submit(a, 0.0)
    assert placed(dispatcher.poll(0.0)) == [("a", "d0")]
    dispatcher.report(large, make_report(draining=True), 0.1)
    assert dispatcher.poll(0.1) == []
    if back == "refused":
        dispatcher.refused(a)
    else:
        dispatcher.lost(a, 0.2, gone=True)
    (outcome,) = dispatcher.poll(0.2)
    assert isinstance(outcome, Rejection)
    assert isinstance(outcome.error, PromptTooLong)


def test_a_deadline_that_cannot_be_met_is_refused_at_once_with_a_time_to_try_again(
    roster, dispatcher, add_worker, make_report
):
    now = drained(roster, dispatcher, add_worker, make_report, 4, 8)
    assert dispatcher.num_waiting == 2
    dispatcher.admit(DEFAULT_TIER, 0, "", now, now + 0.7)
    with pytest.raises(Overloaded, match="the deadline in 0") as caught:
        dispatcher.submit(job("late", deadline=now + 0.3), now)
    assert caught.value.retry_after == pytest.approx(0.2, abs=0.1)
    with pytest.raises(Overloaded, match="the deadline in 0"):
        dispatcher.admit(DEFAULT_TIER, 0, "", now, now + 0.3, client_resumes=True)
    dispatcher.admit(DEFAULT_TIER, -1, "", now, now + 0.3)  # no request is ahead of an urgent one


def test_a_full_queue_says_when_half_of_it_will_have_left(roster, dispatcher, add_worker, make_report):
    now = drained(roster, dispatcher, add_worker, make_report, 2, 8)
    dispatcher.submit(job("last"), now)
    with pytest.raises(Overloaded) as caught:
        dispatcher.submit(job("more"), now)
    assert caught.value.retry_after == pytest.approx(0.75, abs=0.3)


def test_a_limit_on_waiting_refuses_requests_that_would_wait_longer(roster, add_worker, make_report):
    dispatcher = Dispatcher(roster, max_queue=100, max_wait=1.0)
    now = drained(roster, dispatcher, add_worker, make_report, 4, 8)
    for index in range(2):
        dispatcher.submit(job(f"more{index}"), now)
    with pytest.raises(Overloaded, match="the limit 1 s"):
        for index in range(4):
            dispatcher.submit(job(f"too many{index}"), now)


def test_a_placement_that_a_worker_refuses_does_not_make_the_queue_look_fast(roster, add_worker, make_report):
    dispatcher = Dispatcher(roster, max_queue=100, max_wait=2.0)
    now = drained(roster, dispatcher, add_worker, make_report, 4, 8)
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


def test_idle_time_does_not_count_as_a_slow_queue(roster, dispatcher, add_worker, make_report):
    now = drained(roster, dispatcher, add_worker, make_report, 4, 8)
    for waiting in list(dispatcher.waiting()):
        dispatcher.finish(waiting)
    dispatcher.poll(now)
    now += 1000.0
    dispatcher.poll(now)
    dispatcher.submit(job("a"), now)
    dispatcher.poll(now)
    dispatcher.admit(DEFAULT_TIER, 0, "", now, now + 0.5)


def test_no_decision_looks_at_every_worker(roster, add_worker):
    """Runs requests through pools of 300 workers; each decision reads a few workers at most."""
    dispatcher = Dispatcher(roster)
    for index in range(300):
        add_worker(roster, f"p{index}", PREFILL)
        add_worker(roster, f"d{index}")
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
        dispatcher.submit(each, 0.0)
        dispatcher.poll(0.0)
        dispatcher.reserved(each)
        dispatcher.poll(0.0)
        dispatcher.prefill_done(each, 0.0)
        dispatcher.finish(each)
    assert 0 < len(looks) <= 20 * 3


def test_finish_frees_everything_in_any_state_and_may_be_repeated(roster, dispatcher, add_worker):
    workers = [add_worker(roster, "d0"), add_worker(roster, "p0", PREFILL)]
    for steps in range(4):
        a = job("a")
        dispatcher.submit(a, 0.0)
        if steps > 0:
            dispatcher.poll(0.0)
        if steps > 1:
            dispatcher.reserved(a)
        if steps > 2:
            dispatcher.poll(0.0)
        dispatcher.finish(a)
        dispatcher.finish(a)
        assert [w.in_flight for w in workers] == [0, 0]
        assert (dispatcher.num_jobs, dispatcher.num_waiting) == (0, 0)
        check(dispatcher, 0.0)


class Dispatching(RuleBasedStateMachine):
    """Workers join, leave, report and refuse while requests run; in the end every request is answered or refused.

    Decode workers whose names begin with d have the default tier; those with f have the tier fast. A name with b is a
    worker with both stages, of the default tier.
    """

    BLOCK = 16
    TIERS: ClassVar = {"d": DEFAULT_TIER, "f": "fast", "b": DEFAULT_TIER}
    NAMES = ("d0", "d1", "d2", "f0", "f1", "p0", "p1", "b0", "b1")

    def __init__(self):
        super().__init__()
        self.now = 0.0
        self.roster = Roster(tiers=[Tier(name) for name in dict.fromkeys(self.TIERS.values())])
        self.dispatcher = Dispatcher(self.roster, max_queue=6, claim_after=3.0, absent_after=8.0)
        self.ids = itertools.count()
        self.open: list[Job] = []
        self.ended: list[Job] = []

    def poll(self):
        for outcome in self.dispatcher.poll(self.now):
            if isinstance(outcome, Rejection):
                self.open.remove(outcome.job)
                self.ended.append(outcome.job)
        check(self.dispatcher, self.now)
        reserving = [j for j in self.open if j.state is JobState.PLACED]
        assert all(j.prefill is None or self.now - j.placed_at < RESERVE_TIMEOUT for j in reserving)
        late = sum(self.now - j.placed_at >= RESERVE_TIMEOUT for j in reserving)
        assert len(self.dispatcher.reservations.on_time) == len(reserving) - late
        assert all(worker.paused_until_report for worker in self.dispatcher.reservations.silent(self.now))

    def join(self, name, incarnation):
        """Returns the worker in each of its pools."""
        spec = KvSpec(1, 1, 2, "float32", RopeSpec())
        identity, tier = KvIdentity(1, "a", "b", spec), self.TIERS.get(name[0], "")
        decode = WorkerInfo(name, incarnation, DECODE, name, (), identity, 0, 9, tier=tier, colocated=name[0] == "b")
        prefill = replace(decode, stage=PREFILL, tier="")
        infos = {"p": [prefill], "b": [prefill, decode]}.get(name[0], [decode])
        return self.roster.join_all(infos)

    def report(self, workers, *load, **state):
        for worker in workers:
            self.report_stage(worker, *load, **state)

    def report_stage(self, worker, total, credits, *, ready=True, draining=False, prefix=None):
        load = decode_pb2.WorkerLoad(kv_blocks_total=total, block_size=self.BLOCK, running=worker.in_flight)
        report = registry_pb2.Report(load=load, credits=credits, ready=ready, draining=draining, prefix=prefix)
        self.roster.pool_of(worker).report(worker, report, self.now)

    def pick(self, data, *states):
        jobs = [j for j in self.open if j.state in states]
        return data.draw(st.sampled_from(jobs)) if jobs else None

    @initialize(prefill=st.sampled_from(list(POLICIES)), decode=st.sampled_from(list(POLICIES)))
    def start(self, prefill, decode):
        self.roster.use(POLICIES[prefill](), POLICIES[decode])
        for name in ("d0", "f0", "p0"):
            self.report(self.join(name, 0), 20, 2)

    @rule(
        name=st.sampled_from(NAMES),
        incarnation=st.integers(0, 2),
        total=st.sampled_from([4, 20, 60]),
        credits=st.integers(0, 3),
        ready=st.booleans(),
        draining=st.booleans(),
    )
    def worker_reports(self, name, incarnation, total, credits, ready, draining):
        workers = self.roster.find_all(name)
        if not workers or workers[0].info.incarnation != incarnation:
            workers = self.join(name, incarnation)
        self.report(workers, total, credits, ready=ready, draining=draining)
        self.poll()

    @rule(name=st.sampled_from(NAMES))
    def worker_leaves(self, name):
        for worker in self.roster.find_all(name):
            self.roster.pool_of(worker).remove(worker)
        self.poll()

    @rule(seconds=st.sampled_from([0.1, 1.0, 4.0]))
    def time_passes(self, seconds):
        self.now += seconds
        self.poll()

    @rule(name=st.sampled_from(["p0", "p1", "b0"]), keys=st.sets(st.integers(0, 9)), replaces=st.booleans())
    def prefix_cache_changes(self, name, keys, replaces):
        if (worker := self.roster.prefill.get(name)) is not None:
            added = [key for key in keys if key not in worker.prefix_keys or replaces]
            delta = registry_pb2.PrefixDelta(added=added, removed=keys & worker.prefix_keys, replaces=replaces)
            self.report_stage(worker, 60, 3, prefix=delta)
            self.poll()

    @rule(
        prompt=st.integers(1, 400),
        answer=st.integers(1, 200),
        emitted=st.sampled_from([0, 0, 1]),
        priority=st.sampled_from([0, 0, 1, -1]),
        key=st.sampled_from(["", "other"]),
        deadline=st.none() | st.floats(0, 10),
        blocks=st.lists(st.integers(0, 9), max_size=4, unique=True),
        tier=st.sampled_from([*TIERS.values()]),
        fallback=st.sampled_from(["", *TIERS.values()]),
    )
    def submit(self, prompt, answer, emitted, priority, key, deadline, blocks, tier, fallback):
        if deadline is not None:
            deadline += self.now
        job = make_job(
            str(next(self.ids)),
            prompt,
            answer,
            tier=tier,
            fallback="" if fallback == tier else fallback,
            emitted=emitted,
            priority=priority,
            key=key,
            deadline=deadline,
            block_keys=lambda block_size: iter(blocks),
        )
        try:
            self.dispatcher.submit(job, self.now)
        except (Overloaded, PromptTooLong):
            self.ended.append(job)
        else:
            self.open.append(job)
        self.poll()

    @rule(data=st.data())
    def start_carries_a_prefill_worker(self, data):
        if job := self.pick(data, JobState.PLACED):
            had = job.prefill
            resumed = any(waiting.migrated for waiting in self.dispatcher._prefill_queue)
            worker = self.dispatcher.prefill_with_start(job)
            assert worker is None or (had is None and not resumed and job.prefill is worker)
            check(self.dispatcher, self.now)

    @rule(data=st.data())
    def decode_reserves(self, data):
        if job := self.pick(data, JobState.PLACED):
            self.dispatcher.reserved(job)
            self.poll()

    @rule(data=st.data())
    def decode_refuses(self, data):
        if job := self.pick(data, JobState.PLACED):
            self.dispatcher.refused(job)
            self.poll()

    @rule(data=st.data(), gone=st.booleans())
    def decode_is_lost(self, data, gone):
        if job := self.pick(data, JobState.PLACED, JobState.WANTS_PREFILL, JobState.RUNNING):
            self.dispatcher.lost(job, self.now, gone=gone)
            self.poll()

    @rule(data=st.data(), failed=st.booleans(), pause=st.booleans())
    def prefill_is_needed_again(self, data, failed, pause):
        if job := self.pick(data, JobState.RUNNING):
            self.dispatcher.need_prefill(job, job.prefill, failed=failed, pause=pause)
            self.poll()

    @rule(data=st.data())
    def tokens_come(self, data):
        # A draining worker with both stages does not wait for a slot.
        if job := self.pick(data, JobState.RUNNING, JobState.WANTS_PREFILL):
            self.dispatcher.prefill_done(job, self.now)
            self.poll()

    @rule(data=st.data())
    def request_ends(self, data):
        if job := self.pick(data, *JobState):
            self.dispatcher.finish(job)
            self.open.remove(job)
            self.ended.append(job)
            self.poll()

    @precondition(lambda self: self.open)
    @invariant()
    def nobody_is_forgotten(self):
        assert self.dispatcher.num_jobs == len(self.open)

    def teardown(self):
        """With healthy workers and no more failures, every request is answered or refused."""
        for name in self.NAMES:
            self.report(self.join(name, 99), 60, 3)
        for _ in range(200):
            self.poll()
            for job in list(self.open):
                if job.state is JobState.PLACED:
                    self.dispatcher.reserved(job)
                elif job.state is JobState.RUNNING:
                    self.dispatcher.finish(job)
                    self.open.remove(job)
            self.report(self.roster.workers(), 60, 3)
            if not self.open:
                break
        assert not self.open
        assert self.dispatcher.num_jobs == self.dispatcher.num_waiting == 0
        assert all(w.in_flight == 0 for w in self.roster.workers())


Dispatching.TestCase.settings = settings(max_examples=150, stateful_step_count=50, deadline=None)
TestDispatching = Dispatching.TestCase

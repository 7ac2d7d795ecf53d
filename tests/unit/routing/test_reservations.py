"""Tests when a placed job is overdue, and when its decode worker is silent."""

from dataclasses import replace

import pytest
from jobs import make_job

from overfill.routing.reservations import RESERVE_TIMEOUT, SILENCE, SILENT_AFTER, Reservations
from overfill.routing.worker import Worker


@pytest.fixture
def reservations():
    return Reservations()


@pytest.fixture
def worker(make_info):
    return Worker(make_info("d0"))


@pytest.fixture
def place(reservations, worker):
    def place(name, now=0.0, on=worker, **more):
        job = make_job(name, prompt_tokens=1, max_tokens=1, **more)
        job.placed_at, job.decode = now, on
        reservations.add(job, on)
        return job

    return place


def pass_time(reservations, now):
    """Returns what the dispatcher asks in each poll: the overdue jobs and the silent workers."""
    return reservations.expire(now), reservations.silent(now)


def test_a_job_is_overdue_once_from_the_timeout_on(reservations, place):
    first, second = place("first"), place("second", 0.25)
    assert reservations.expire(RESERVE_TIMEOUT - 0.1) == []
    assert reservations.expire(RESERVE_TIMEOUT) == [first]
    assert (reservations.on_time, reservations.overdue) == ({second}, {first})
    assert reservations.expire(RESERVE_TIMEOUT + 0.25) == [second]
    assert reservations.num_expired == 2


@pytest.mark.parametrize("how", ["answered", "forget"])
def test_a_job_whose_answer_came_or_is_not_awaited_is_never_overdue(reservations, place, how):
    on_time = place("on time")
    getattr(reservations, how)(on_time)
    assert reservations.expire(RESERVE_TIMEOUT) == []
    late = place("late")
    reservations.expire(RESERVE_TIMEOUT)
    getattr(reservations, how)(late)
    assert (reservations.on_time, reservations.overdue) == (set(), set())


def test_a_worker_that_answers_nothing_is_silent_for_a_while(reservations, place, worker):
    place("stuck")
    assert pass_time(reservations, SILENT_AFTER - 0.1)[1] == []
    assert pass_time(reservations, SILENT_AFTER)[1] == [worker]
    assert pass_time(reservations, SILENT_AFTER + SILENCE - 0.1)[1] == [worker]
    assert pass_time(reservations, SILENT_AFTER + SILENCE)[1] == []


def test_an_answer_ends_the_silence(reservations, place, worker):
    stuck = place("stuck")
    pass_time(reservations, SILENT_AFTER)
    reservations.answered(stuck)
    assert reservations.silent(SILENT_AFTER) == []


def test_a_cancelled_job_does_not_end_the_silence(reservations, place, worker):
    stuck = place("stuck")
    pass_time(reservations, SILENT_AFTER)
    reservations.forget(stuck)
    assert reservations.silent(SILENT_AFTER) == [worker]


def test_a_worker_that_answers_another_job_meanwhile_is_not_silent(reservations, place):
    place("late")
    reservations.answered(place("other", 0.1))
    assert pass_time(reservations, SILENT_AFTER)[1] == []


def test_a_worker_that_may_be_late_is_not_silent(reservations, place, worker, make_info):
    place("compiles", compiles=True)
    place("long step", on=Worker(replace(make_info("both"), colocated=True)))
    overdue, silent = pass_time(reservations, SILENT_AFTER)
    assert (len(overdue), silent) == (2, [])

"""Tests the callbacks of placements: each is called once, none disturbs another, and none nests."""

import asyncio

import pytest
from jobs import make_job

from overfill.routing.async_dispatcher import AsyncDispatcher
from overfill.routing.dispatcher import Dispatcher
from overfill.routing.pool import Roster
from overfill.routing.reservations import RESERVE_TIMEOUT
from overfill.routing.tier import DEFAULT_TIER
from overfill.routing.worker import PREFILL


@pytest.fixture
async def roster(add_worker):
    roster = Roster()
    now = asyncio.get_running_loop().time()
    add_worker(roster, "d0", now=now)
    add_worker(roster, "p0", PREFILL, now=now)
    return roster


@pytest.fixture
def dispatcher(roster):
    return AsyncDispatcher(Dispatcher(roster))


def job(name):
    return make_job(name, prompt_tokens=16, max_tokens=4)


@pytest.fixture
def report(roster, dispatcher, make_report):
    """Returns a function that reports a number of credits for both workers."""

    def report(credits):
        for worker in roster.workers():
            dispatcher.report(worker, make_report(credits=credits, total=10_000))

    return report


async def test_a_callback_that_raises_ends_its_own_job_only(dispatcher, roster, report):
    report(0)
    placed = []

    def fail(outcome):
        placed.append("bad")
        raise RuntimeError("a bug")

    dispatcher.submit(job("bad"), fail)
    good = [job("b"), job("c")]
    for each in good:
        dispatcher.submit(each, lambda _, each=each: placed.append(each.id))
    report(3)
    assert placed == ["bad", "b", "c"]
    assert [w.in_flight for w in roster.decode[DEFAULT_TIER]] == [2]
    for each in good:
        dispatcher.finish(each)
    assert [w.in_flight for w in roster.decode[DEFAULT_TIER]] == [0]


async def test_callbacks_do_not_nest(dispatcher, roster, report):
    report(0)
    depth, placed = 0, []

    def end(each):
        nonlocal depth
        depth += 1
        assert depth == 1, "a callback was called within another"
        placed.append(each.id)
        dispatcher.finish(each)  # makes room for the next
        depth -= 1

    for number in range(900):
        each = job(f"j{number}")
        dispatcher.submit(each, lambda _, each=each: end(each))
    report(1)
    assert len(placed) == 900
    assert [w.in_flight for w in roster.decode[DEFAULT_TIER]] == [0]


async def test_a_slot_that_is_given_back_is_a_change(dispatcher, roster, report, monkeypatch):
    each = job("late")
    dispatcher.submit(each, lambda _: None)
    assert dispatcher.prefill_with_start(each) is roster.find("p0")
    version, now = dispatcher.version, asyncio.get_running_loop().time()
    monkeypatch.setattr(dispatcher, "_now", lambda: now + RESERVE_TIMEOUT)
    report(3)
    assert roster.find("p0").in_flight == 0
    assert dispatcher.version > version
    dispatcher.finish(each)

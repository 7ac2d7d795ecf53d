"""The load generator: open and closed loops, users over time, and requests that fail."""

from __future__ import annotations

import asyncio
import itertools

import pytest

from overfill.client import Timing
from overfill.lab.traffic.outcome import RequestFailed
from overfill.lab.traffic.play import closed_loop, open_loop, run_load
from overfill.lab.traffic.traces import TraceRequest

TIMING = Timing(ttft=0.9, router_queue=0.2, total=2.0)


class BarrierTarget:
    """A target that ends its requests as soon as ``size`` of them run at once."""

    def __init__(self, size):
        self.barrier = asyncio.Barrier(size)
        self.concurrent = self.max_concurrent = 0

    async def stream(self, prompt, max_tokens, received, tier):
        self.concurrent += 1
        self.max_concurrent = max(self.max_concurrent, self.concurrent)
        yield 1
        await self.barrier.wait()
        self.concurrent -= 1
        yield max_tokens


class CannedTarget:
    """A target that reports ``counts`` tokens in turn and then fails if ``failure`` is set. Keeps prompts and tiers."""

    def __init__(self, counts, failure=None):
        self.counts, self.failure = counts, failure
        self.prompts, self.tiers = [], []

    async def stream(self, prompt, max_tokens, received, tier):
        self.prompts.append(list(prompt))
        self.tiers.append(tier)
        for count in self.counts:
            yield count
        if self.failure:
            raise RequestFailed(self.failure)
        received.timing, received.tier = TIMING, tier or "default"


async def played(counts, failure=None, **request):
    (outcome,) = await run_load(CannedTarget(counts, failure), [TraceRequest(0.0, 8, 5, **request)], 100)
    return outcome


@pytest.mark.parametrize(("concurrency", "together"), [(None, 6), (2, 2), (3, 3), (lambda _: 3, 3)])
async def test_a_closed_loop_has_its_concurrency_and_an_open_one_never_waits(concurrency, together):
    target = BarrierTarget(together)
    requests = [TraceRequest(0.0, 8, 5)] * 6
    outcomes = await run_load(target, requests, 100, concurrency=concurrency, timeout=60)
    assert target.max_concurrent == together
    assert [len(outcome.times) for outcome in outcomes] == [5] * 6
    assert all(outcome.ok for outcome in outcomes)


async def test_users_come_and_leave_over_time():
    wanted, running, over = 1, 0, False
    answer = asyncio.Event()

    async def send():
        nonlocal running
        running += 1
        await answer.wait()
        running -= 1

    async def until_they_are(count):
        async with asyncio.timeout(30):
            while running != count:
                await asyncio.sleep(0.001)

    loop = asyncio.create_task(closed_loop(send, lambda _: wanted, lambda: over))
    await until_they_are(1)
    wanted = 3
    await until_they_are(3)
    wanted = 1
    answered, answer = answer, asyncio.Event()
    answered.set()
    await until_they_are(1)
    assert not loop.done()
    over = True
    answer.set()
    await loop
    assert running == 0


async def test_a_loop_that_is_over_sends_nothing_more_and_waits_for_what_runs():
    sent, ended, asked = [], [], itertools.count(1)

    async def send():
        sent.append(None)
        await asyncio.sleep(0.01)
        ended.append(None)

    await open_loop(send, [0.0, 0.0, 0.0], lambda: next(asked) == 3)
    assert len(sent) == len(ended) == 2
    await closed_loop(send, 2, lambda: len(sent) >= 7)
    assert len(sent) == len(ended) == 7


async def test_endless_requests_end_with_the_time():
    ended = []
    requests = itertools.cycle([TraceRequest(0.0, 8, 5)] * 2)
    outcomes = await run_load(BarrierTarget(1), requests, 100, concurrency=2, duration=0.05, ended=ended.append)
    assert len(outcomes) > 2
    assert sorted(ended, key=outcomes.index) == outcomes


async def test_a_request_that_takes_too_long_has_failed():
    (outcome,) = await run_load(BarrierTarget(2), [TraceRequest(0.0, 8, 5)], 100, timeout=0.05)
    assert not outcome.ok
    assert outcome.error == "not finished after 0.05 s"


async def test_requests_that_an_interrupted_run_leaves_have_failed():
    ended = []
    run = asyncio.create_task(run_load(BarrierTarget(4), [TraceRequest(0.0, 8, 5)] * 3, 100, ended=ended.append))
    await asyncio.sleep(0.05)
    run.cancel()
    with pytest.raises(asyncio.CancelledError):
        await run
    assert [outcome.error for outcome in ended] == ["the run was interrupted"] * 3


async def test_tokens_of_one_message_came_together_and_the_server_s_last_count_counts():
    outcome = await played([1, 3])
    first, second, third = outcome.times
    assert first <= second == third
    assert outcome.tokens == 3
    corrected = await played([1, 2, 3, 2])
    assert (len(corrected.times), corrected.tokens) == (3, 2)


async def test_an_outcome_has_the_request_s_tier_and_what_the_server_said():
    outcome = await played([1], tier="full")
    assert (outcome.tier, outcome.written_by, outcome.timing) == ("full", "full", TIMING)
    assert (await played([1])).written_by == "default"


async def test_a_failed_request_says_why():
    assert (await played([1], "the stream broke off")).error == "the stream broke off"
    assert (await played([])).error == "no token arrived"


async def test_latency_counts_from_when_a_request_was_due():
    target = CannedTarget([1])
    requests = [TraceRequest(arrival, 8, 5) for arrival in (0.0, 0.01)]
    for concurrency in (None, 1):
        outcomes = await run_load(target, requests, 100, concurrency=concurrency)
        due = [outcome.due for outcome in outcomes]
        assert due == ([0.0, 0.01] if concurrency is None else [outcome.sent for outcome in outcomes])
        assert all(outcome.sent >= outcome.due for outcome in outcomes)


async def test_prompts_are_made_before_they_are_due(monkeypatch):
    made, target = [], CannedTarget([1])
    prompt = TraceRequest.prompt
    monkeypatch.setattr(TraceRequest, "prompt", lambda *args: made.append(len(target.prompts)) or prompt(*args))
    await run_load(target, [TraceRequest(0.0, 8, 5)] * 3, 100)
    assert made == [0, 0, 0]
    assert len({tuple(prompt) for prompt in target.prompts}) == 3, "no two prompts are equal"

"""Tests that one timer limits the waits of many tasks, each on its own."""

import asyncio

import pytest

from overfill.rpc.shared_timeout import SharedTimeout

LONG = 600.0


@pytest.fixture
def limit():
    return SharedTimeout()


async def test_a_wait_that_ends_in_time_returns_its_result_and_leaves_nothing(limit):
    assert await limit.wait(asyncio.sleep(0, "read"), LONG) == "read"
    with pytest.raises(ZeroDivisionError):
        await limit.wait(divide(), LONG)
    assert not limit._deadlines


async def divide():
    return 1 // 0


async def test_each_wait_has_its_own_limit(limit):
    late, never = asyncio.Event(), asyncio.Event()
    first = asyncio.create_task(limit.wait(never.wait(), 0.05))
    second = asyncio.create_task(limit.wait(never.wait(), 0.1))
    third = asyncio.create_task(limit.wait(late.wait(), LONG))
    with pytest.raises(TimeoutError):
        await first
    assert not second.done()
    with pytest.raises(TimeoutError):
        await second
    late.set()
    assert await third
    assert not limit._deadlines


async def test_a_task_goes_on_after_a_wait_was_given_up(limit):
    with pytest.raises(TimeoutError):
        await limit.wait(asyncio.Event().wait(), 0)
    assert not asyncio.current_task().cancelling()
    await asyncio.sleep(0)


async def test_a_cancelled_task_stays_cancelled(limit):
    waiting = asyncio.create_task(limit.wait(asyncio.Event().wait(), LONG))
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting

    async def cancelled_as_its_limit_passes():
        try:
            await limit.wait(asyncio.Event().wait(), 0)
        finally:
            assert asyncio.current_task().cancelling()

    waiting = asyncio.create_task(cancelled_as_its_limit_passes())
    await asyncio.sleep(0)
    limit._expire(asyncio.get_running_loop())  # the limit and the other cause cancel it in the same turn
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting

"""Tests that an idle or stopped engine checks for lost blocks, and ends if it finds one."""

import threading
from dataclasses import replace

from overfill.engine import thread
from overfill.engine.sequence import Lend, Release
from overfill.engine.thread import EngineThread
from overfill.kv.keys import PromptBlocks
from overfill.telemetry.engine_load import EngineLoad


def test_a_core_is_checked_once_each_time_it_falls_idle(core):
    engine = EngineThread(core, "e", 1)
    engine.start()
    for _ in range(2):
        engine.send("work")
        assert core.checked.acquire(timeout=10)
    engine.stop()
    assert core.checked.acquire(timeout=10), "it is also checked when it stops"
    assert not core.checked.acquire(blocking=False)
    assert engine.failure is None


def test_only_freed_capacity_is_reported_at_once(core):
    busy = EngineLoad(blocks_used=8, blocks_total=9, running=3, waiting=1)
    for change in ({"blocks_used": 9}, {"running": 4, "waiting": 0}, {"waiting": 2}, {"blocks_cached": 1}):
        assert not replace(busy, **change).freed_capacity_since(busy)
    for change in ({"blocks_used": 7}, {"running": 2}, {"waiting": 0}):
        assert replace(busy, **change).freed_capacity_since(busy)
    told = []
    engine = EngineThread(core, "e", 1, on_load_change=told.append)
    core.load = lambda: EngineLoad(2, 8, 1, 0)
    engine._publish_load()
    core.load = lambda: EngineLoad(0, 8, 0, 0)
    engine._publish_load()
    engine._publish_load()
    assert told == [False, True]


def test_steps_in_a_row_look_at_the_load_rarely_and_the_last_one_always(core, monkeypatch):
    monkeypatch.setattr(thread, "_LOAD_GAP", 3600.0)
    looks, left = [], [1, 2, 3, 4]

    def load():
        looks.append(len(left))
        return EngineLoad(2, 8, 1, 0)

    core.load = load
    core.step = lambda: left.pop() > 1
    engine = EngineThread(core, "e", 1)
    engine.start()
    engine.send("work")
    assert core.checked.acquire(timeout=10)
    engine.stop()
    assert looks[:3] == [4, 4, 0], "at first, after the message, and after the step that ends the work"


def test_loans_are_delivered_within_a_step_and_other_messages_behind_it_in_order(core):
    loans = [Lend(name, PromptBlocks([], 4, None, "")) for name in "ab"]
    handled, steps = [], []
    core.new_loans = tuple
    core.handle = handled.append

    def step():
        if steps:
            return False
        steps.append(1)
        for message in (Release("x"), loans[0], Release("a"), loans[1], "last"):
            engine.send(message)
        assert list(core.new_loans()) == loans
        assert not core.new_loans()
        return True

    core.step = step
    engine = EngineThread(core, "e", 1)
    engine.start()
    engine.send("first")
    assert core.checked.acquire(timeout=10), "the thread is idle"
    engine.stop()
    assert engine.failure is None
    assert handled == ["first", Release("x"), Release("a"), "last"]


def test_a_lost_block_ends_the_engine(core):
    engine = EngineThread(core, "e", 1)
    core.fault = AssertionError("block 3 is lost")
    engine.start()
    engine.send("work")
    assert core.checked.acquire(timeout=10)
    engine.stop()
    assert engine.failure is core.fault
    assert not engine.alive


def test_each_step_is_a_turn_at_the_cores(core):
    found, left = [], [1, 2, 3]

    class Cores:
        def __enter__(self):
            found.append("begin")

        def __exit__(self, *_):
            found.append("end")

    def step():
        found.append(left.pop(0))
        return bool(left)

    core.step = step
    engine = EngineThread(core, "e", 2, cores=Cores())
    engine.start()
    engine.send("work")
    assert core.checked.acquire(timeout=10)
    engine.stop()
    assert found == ["begin", 1, "end", "begin", 2, "end", "begin", 3, "end"]


def test_the_first_steps_of_an_engine_may_take_longer(core, monkeypatch, caplog):
    """They may compile kernels."""
    monkeypatch.setattr(thread, "FIRST_STEPS", 1)
    limit, stuck, begun = 0.1, threading.Event(), []

    def step():
        begun.append(None)
        if len(begun) == 1:
            stuck.wait(5 * limit)
            return True
        assert stuck.wait(10)
        return False

    core.step = step
    engine = EngineThread(core, "e", 1, limit, stuck.set, first_step_timeout=60.0)
    engine.start()
    engine.send("work")
    assert stuck.wait(10)
    engine.stop()
    assert len(begun) == 2
    assert "a step has taken more than 0.1 s: step 2, of 3 sequences with 17 tokens" in caplog.text


def test_a_first_step_has_a_limit_too(core, caplog):
    stuck = threading.Event()
    core.step = lambda: not stuck.wait(10)
    engine = EngineThread(core, "e", 1, 60.0, stuck.set, first_step_timeout=0.1)
    engine.start()
    engine.send("work")
    assert stuck.wait(10)
    engine.stop()
    assert "more than 0.1 s: step 1" in caplog.text

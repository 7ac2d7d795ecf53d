"""Tests that work for ``cuda:1`` uses that device, not the thread's current one. Parts of torch are replaced."""

import threading

import pytest
import torch
from counting import CountingRunner

from overfill.engine.device import device_executor, native_dtype, resolve_device
from overfill.engine.prefill import PrefillEngine
from overfill.engine.sequence import KvWritten, PrefillScheduled, PrefillSequence, Submit
from overfill.engine.thread import EngineThread
from overfill.kv.blocks import BlockPool
from overfill.kv.prefix import PrefixCache
from overfill.request.params import SamplingParams

SECOND = torch.device("cuda", 1)


class Event:
    """Keeps the device of the stream that recorded it; without a stream, the current device 0."""

    def __init__(self):
        self.device = None

    def record(self, stream=None):
        self.device = torch.device("cuda", 0) if stream is None else stream.device


class Stream:
    def __init__(self, device=None):
        self.device = device


@pytest.fixture
def cuda(monkeypatch):
    """Replaces the parts of ``torch.cuda`` that the engine uses; returns the device that each thread has set."""
    current = {}
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: current.update({threading.get_ident(): device}))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    return current


def test_kv_is_marked_as_written_on_the_device_that_computes_it(cuda):
    runner = CountingRunner()
    runner.device = SECOND
    events, prefix = [], PrefixCache(BlockPool(8, 4))
    engine = PrefillEngine(runner, prefix.pool, 8, 4, events.extend, prefix)
    for name in "ab":  # the second one finds a cached prefix, which may still be being computed
        engine.handle(Submit(PrefillSequence(name, list(range(10)), SamplingParams(temperature=0))))
        while engine.step():
            pass
    marks = [event.event for event in events if isinstance(event, KvWritten)]
    marks += [event.event for event in events if isinstance(event, PrefillScheduled) and event.cached_tokens]
    assert len(marks) == 4
    assert {mark.device for mark in marks} == {SECOND}


def test_the_engine_s_thread_uses_its_device(cuda, core):
    stepped = []
    core.handle = lambda message: stepped.append(threading.get_ident())
    engine = EngineThread(core, "e", 1, device=SECOND)
    engine.start()
    engine.send("work")
    engine.stop()
    assert engine.failure is None
    assert [cuda[thread] for thread in stepped] == [SECOND]


def test_threads_that_move_kv_use_the_cache_s_device(cuda):
    with device_executor(1, "kv", SECOND) as executor:
        assert cuda[executor.submit(threading.get_ident).result()] == SECOND
    cuda.clear()  # thread ids are reused
    with device_executor(1, "kv", torch.device("cpu")) as executor:
        assert executor.submit(threading.get_ident).result() not in cuda


@pytest.mark.parametrize(
    ("capability", "dtype"), [((7, 0), "float16"), ((7, 5), "float16"), ((8, 0), "bfloat16"), ((12, 0), "bfloat16")]
)
def test_gpus_before_ampere_compute_in_float16(monkeypatch, capability, dtype):
    monkeypatch.setattr(torch.cuda, "get_device_capability", {SECOND: capability}.get)
    assert native_dtype(SECOND) == dtype


def test_a_cuda_device_has_a_number(cuda):
    assert resolve_device("auto") == resolve_device("cuda") == torch.device("cuda", 0)
    assert resolve_device("cuda:1") == SECOND

"""Fixtures of the engines' tests: a runner without a model, a pool that must be free at the end, a list of events."""

import threading

import pytest
from counting import CountingRunner

from overfill.engine import thread
from overfill.kv.blocks import BlockPool
from overfill.telemetry.engine_load import EngineLoad


@pytest.fixture
def runner():
    return CountingRunner()


@pytest.fixture
def pool():
    """Eight blocks of four tokens; fails the test if any is still owned at the end."""
    pool = BlockPool(8, 4)
    yield pool
    pool.check_integrity()
    assert pool.num_used == 0, "the test leaked blocks"


@pytest.fixture
def events():
    """Receives the engine's events, in order."""
    return []


class IdleCore:
    """An engine core without work that counts its checks; its next check raises ``fault``."""

    def __init__(self):
        self.checked = threading.Semaphore(0)
        self.fault = None

    def handle(self, message):
        pass

    def step(self):
        return False

    step_shape = (3, 17)
    delay = 0.0

    def load(self):
        return EngineLoad(0, 8, 0, 0)

    def close(self):
        pass

    def check(self):
        self.checked.release()
        if self.fault is not None:
            raise self.fault


@pytest.fixture
def core(monkeypatch):
    monkeypatch.setattr(thread, "_IDLE", 0.01)
    return IdleCore()

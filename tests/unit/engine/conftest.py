"""Fixtures of the engines' tests: a runner without a model, a pool that must be free at the end, a list of events."""

import pytest
from counting import CountingRunner

from overfill.kv.blocks import BlockPool


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

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def no_garbage_collection() -> Iterator[None]:
    """Objects in reference cycles stay in memory during the test."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()

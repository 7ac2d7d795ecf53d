"""Fixtures of all suites: a check for lost blocks after each test, and a tiny pair."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from overfill.kv.blocks import BlockPool

_POOLS: weakref.WeakSet[BlockPool] = weakref.WeakSet()


@pytest.fixture(autouse=True, scope="session")
def _remember_pools() -> Iterator[None]:
    make = BlockPool.__init__

    def make_and_remember(self: BlockPool, *args: Any, **kwargs: Any) -> None:
        make(self, *args, **kwargs)
        _POOLS.add(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BlockPool, "__init__", make_and_remember)
        yield


@pytest.fixture(autouse=True)
def every_block_is_free_or_owned_once() -> Iterator[None]:
    """After each test, fails it if a block of any pool in this process is lost or has two owners."""
    yield
    for pool in list(_POOLS):
        pool.check_integrity()


@pytest.fixture(scope="session")
def tiny_pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny pair. Tests must not change it; `fresh` makes copies that they may damage."""
    # Imported here because torch takes seconds to import and most unit tests do not need it.
    import torch

    from overfill.pair.tiny import make_tiny_pair

    torch.set_num_threads(1)
    return make_tiny_pair(tmp_path_factory.mktemp("pairs") / "tiny")

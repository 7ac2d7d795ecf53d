"""Fixtures of all suites: a check for lost blocks after each test, a tiny pair, and the engines' conformance pairs."""

from __future__ import annotations

import gc
import signal
import sys
import time
import weakref
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from overfill.kv.blocks import BlockPool
from overfill.settings.tiers import TierSpec

# Tests set no limits on time: other processes may use the cores.
settings.register_profile("overfill", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("overfill")

# Support modules whose failed assertions show their values, as those of test modules do.
pytest.register_assert_rewrite("decode_conformance", "prefill_conformance", "engine_drivers", "sampled_reference")

# A shell ignores SIGINT in the jobs that it starts in the background, and processes inherit that. Tests press ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)

# The files that take longest, longest first. Workers of pytest-xdist begin with them, so that none ends alone.
_LONGEST = (
    "integration/test_ray_stack.py",
    "chaos/test_trials.py",
    "integration/test_stack.py",
    "integration/test_slow_link.py",
    "integration/test_default_pair.py",
    "integration/test_prefix_reuse.py",
    "integration/test_named_pairs.py",
    "integration/test_chart_commands.py",
    "integration/test_openai_stack.py",
    "integration/test_loadtest.py",
    "integration/test_locust_options.py",
)
_SUITES = ("chaos", "integration", "fuzz", "unit")  # suites that start processes wait a lot, so they come first

# jsonschema checks IRIs with this package, whose import takes 3 s. No test asks for such a check.
sys.modules["rfc3987_syntax"] = None

_POOLS: weakref.WeakSet[BlockPool] = weakref.WeakSet()


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """Imports the test files without garbage collection, which takes a fifth of that time and finds nothing."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the longest files first."""
    tests = Path(__file__).parent

    def rank(item: pytest.Item) -> tuple[int, int]:
        file = item.path.relative_to(tests)
        longest = _LONGEST.index(str(file)) if str(file) in _LONGEST else len(_LONGEST)
        return longest, _SUITES.index(file.parts[0]) if file.parts[0] in _SUITES else len(_SUITES)

    items.sort(key=rank)


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
        # The engine of a stack that outlives the test moves blocks meanwhile; a real fault stays.
        for _ in range(50):
            try:
                pool.check_integrity()
                break
            except AssertionError:
                time.sleep(0.02)
        else:
            pool.check_integrity()


@pytest.fixture(scope="session")
def tiny_pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny pair. Tests must not change it; `fresh` makes copies that they may damage."""
    # Imported here because torch takes seconds to import and most unit tests do not need it.
    import torch

    from overfill.making.tiny import make_tiny_pair

    torch.set_num_threads(1)
    return make_tiny_pair(tmp_path_factory.mktemp("pairs") / "tiny")


@pytest.fixture(scope="session")
def tiny_tiers(tmp_path_factory: pytest.TempPathFactory) -> tuple[TierSpec, ...]:
    """Three tiers of one tiny full model, a worker each: full, default and fast. Nearly all their tokens differ."""
    import torch

    from overfill.making.tiny import make_tiny_tiers

    torch.set_num_threads(1)
    return make_tiny_tiers(tmp_path_factory.mktemp("tiers"))


@pytest.fixture(scope="session")
def tiny_family(tiny_tiers: tuple[TierSpec, ...]) -> dict[str, Path]:
    """The pairs of ``tiny_tiers``, by tier."""
    return {tier.name: Path(tier.pair) for tier in tiny_tiers}


@pytest.fixture(scope="session")
def conformance_pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pair of the engines' conformance tests: of a geometry that every engine runs."""
    from sampled_reference import make_conformance_pair

    return make_conformance_pair(tmp_path_factory.mktemp("pairs") / "conformance")


@pytest.fixture(scope="session")
def conformance_pair_with_dropped_layers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As ``conformance_pair``; the decoder has no layer for the full model's layer 1."""
    from sampled_reference import make_conformance_pair

    return make_conformance_pair(tmp_path_factory.mktemp("pairs") / "dropped", drop_layers=True)


@pytest.fixture(scope="session")
def conformance_pair_of_one_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As ``conformance_pair``; the full model is the decoder."""
    from sampled_reference import make_conformance_pair

    return make_conformance_pair(tmp_path_factory.mktemp("pairs") / "one", one_model=True)


@pytest.fixture(scope="session")
def conformance_reference() -> Callable[[Path], object]:
    """Returns a function that gives the ``SampledReference`` of a pair folder, loaded once."""
    import torch
    from sampled_reference import SampledReference

    torch.set_num_threads(1)
    return cache(SampledReference)

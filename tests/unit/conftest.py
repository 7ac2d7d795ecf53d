from __future__ import annotations

import gc
import importlib.util
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest


@pytest.fixture
def fresh(tiny_pair: Path, tmp_path: Path) -> Callable[[], Path]:
    """Returns a function that makes a copy of the tiny pair, which the test may damage."""

    def copy() -> Path:
        target = tmp_path / "copy"
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(tiny_pair, target)
        return target

    return copy


@pytest.fixture
def with_vllm(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """Returns a function that makes vLLM count as installed, or not."""
    find = importlib.util.find_spec

    def install(installed: bool) -> None:
        spec = importlib.util.spec_from_loader("vllm", None) if installed else None
        monkeypatch.setattr(
            importlib.util, "find_spec", lambda name, *rest: spec if name == "vllm" else find(name, *rest)
        )

    return install


@pytest.fixture
def no_garbage_collection() -> Iterator[None]:
    """Objects in reference cycles stay in memory during the test."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()

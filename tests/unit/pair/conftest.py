from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from overfill.testing.tiny import make_tiny_pair


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny pair that tests only read."""
    return make_tiny_pair(tmp_path_factory.mktemp("pairs") / "tiny")


@pytest.fixture
def fresh(tiny: Path, tmp_path: Path) -> Callable[[], Path]:
    """Makes copies of the tiny pair that a test may damage."""

    def copy() -> Path:
        target = tmp_path / "copy"
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(tiny, target)
        return target

    return copy

from __future__ import annotations

import shutil
from collections.abc import Callable
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

"""Fixtures of the docs' commands."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from docs_sandbox import Sandbox, fill_cache, new_sandbox, ports_in_use


@pytest.fixture(scope="session")
def sandbox_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("home")
    fill_cache(home)
    return home


@pytest.fixture
def sandbox(sandbox_home: Path) -> Iterator[Sandbox]:
    if used := ports_in_use():
        pytest.fail(f"ports {used} are in use, and the docs show them: end the processes that use them")
    with new_sandbox(sandbox_home) as sandbox:
        yield sandbox

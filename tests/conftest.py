"""What more than one suite needs."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def tiny_pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny pair that tests only read."""
    # Here, since most unit tests need no torch, which takes seconds to import.
    import torch

    from overfill.testing.tiny import make_tiny_pair

    torch.set_num_threads(1)
    return make_tiny_pair(tmp_path_factory.mktemp("pairs") / "tiny")

"""Tests that need vLLM. `make test-vllm` runs them in `.venv-vllm`; without vLLM, pytest collects nothing here."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from overfill.pair.reference import TwoStageReference

collect_ignore_glob = [] if find_spec("vllm") else ["*"]


@pytest.fixture(scope="session")
def vllm_pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny pair whose heads are as wide as vLLM's kernels for CPUs want them. Tests must not change it."""
    import torch

    from overfill.making.tiny import make_tiny_pair

    torch.set_num_threads(1)
    return make_tiny_pair(tmp_path_factory.mktemp("pairs") / "tiny", head_dim=32)


@pytest.fixture(scope="session")
def reference(vllm_pair: Path) -> TwoStageReference:
    """Plain transformers on ``vllm_pair``, which judges answers."""
    from overfill.pair.reference import TwoStageReference

    return TwoStageReference(vllm_pair)

"""Tiny pairs, and whole stacks of real processes that serve them."""

import pytest
import torch

from overfill.testing.tiny import make_tiny_pair


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_pair(tmp_path_factory):
    return make_tiny_pair(tmp_path_factory.mktemp("pairs") / "tiny")

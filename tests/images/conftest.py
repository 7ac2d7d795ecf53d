"""Fixtures of the tests with containers, and a check that nothing of theirs is left."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from runtime import IMAGES, PREFIX, build_images, docker, docker_daemon


@pytest.fixture(scope="session")
def daemon() -> Iterator[None]:
    """A docker daemon. At the end, fails if a container, network or volume of the tests is left."""
    with docker_daemon():
        yield
        left = [
            name
            for kind in (("ps", "--all"), ("network", "ls"), ("volume", "ls"))
            for name in docker(*kind, f"--filter=name={PREFIX}", "--format={{json .}}").splitlines()
        ]
        assert not left, f"left behind: {left}"


@pytest.fixture(scope="session")
def images(daemon: None) -> dict[str, str]:
    """The images, up to date, by target; the first build takes minutes."""
    done = build_images()
    assert done.returncode == 0, done.stdout + done.stderr
    return IMAGES

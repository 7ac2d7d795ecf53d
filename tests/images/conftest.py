"""Fixtures of the tests with containers, and a check that nothing of theirs is left."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from runtime import IMAGES, PREFIX, build_images, docker, docker_daemon

from overfill.api import key_file as keyfile


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


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for a release of the chart, with a file of API keys, and the key."""
    made = tmp_path_factory.mktemp("chart")
    for parent in made.parents[:2]:
        parent.chmod(0o755)  # pytest's folders are closed to user 10001
    made.chmod(0o755)
    (made / "key").write_text(keyfile.create(made / "keys.json", "test"))
    return made

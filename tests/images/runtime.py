"""Docker and podman for tests: their commands, a daemon of the tests' own, and the images' names.

Everything that a test makes has a name that begins with ``PREFIX``.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from overfill.process.home import home
from overfill.version import __version__

ROOT = Path(__file__).parents[2]
PREFIX = "overfill-test-"
IMAGES = {
    "router": f"overfill-router:{__version__}",
    **{target: f"overfill-{target}:{__version__}-cpu" for target in ("prefill", "decode", "ray")},
}
"""Target of the Dockerfile -> image."""

# Images are kept between runs, so that only the first builds them from nothing.
_STORE = home() / "containers"
_PODMAN = ["podman", f"--root={_STORE / 'podman'}", f"--runroot={_STORE / 'podman-run'}", "--runtime=/usr/sbin/runc"]
_START_TIMEOUT = 60  # seconds


def docker(*arguments: str, timeout: float = 600, check: bool = True) -> str:
    """Run docker and return what it prints on stdout. A failure raises AssertionError with its stderr."""
    return _run(["docker", *arguments], timeout, check)


def podman(*arguments: str, timeout: float = 600, check: bool = True) -> str:
    """Run podman, with a store of the tests' own, and return what it prints on stdout."""
    # crun, podman's default, refuses machines with both versions of cgroups.
    return _run([*_PODMAN, *arguments], timeout, check)


def _run(command: list[str], timeout: float, check: bool) -> str:
    env = os.environ | {"PODMAN_IGNORE_CGROUPSV1_WARNING": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False, env=env)
    assert not check or done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-2000:]}{done.stderr[-4000:]}"
    return done.stdout


def need(*programs: str) -> None:
    """Skip the test unless this is root and the programs are installed."""
    if os.geteuid() != 0:
        pytest.skip("needs root, for containers and network namespaces")
    missing = [name for name in programs if shutil.which(name) is None]
    if missing:
        pytest.skip(f"needs {', '.join(missing)}; `make test-images` installs them on Debian")


@contextmanager
def docker_daemon() -> Iterator[None]:
    """Use the docker daemon that answers, or run one of our own. Skips if none can run."""
    need("docker", "dockerd")
    if _answers():
        yield
        return
    _STORE.mkdir(parents=True, exist_ok=True)
    socket = _STORE / "docker.sock"
    command = ["dockerd", f"--data-root={_STORE / 'docker'}", f"--exec-root={_STORE / 'docker-run'}"]
    command += [f"--host=unix://{socket}", f"--pidfile={_STORE / 'docker.pid'}"]
    with (_STORE / "docker.log").open("w") as log, pytest.MonkeyPatch.context() as patch:
        daemon = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            patch.setenv("DOCKER_HOST", f"unix://{socket}")
            until = time.monotonic() + _START_TIMEOUT
            while not _answers():
                if daemon.poll() is not None or time.monotonic() > until:
                    last = (_STORE / "docker.log").read_text().strip().splitlines()[-1:]
                    pytest.skip(f"dockerd does not start here: {' '.join(last)}")
                time.sleep(0.2)
            yield
        finally:
            daemon.terminate()
            daemon.wait(_START_TIMEOUT)


def _answers() -> bool:
    done = subprocess.run(["docker", "info"], capture_output=True, check=False, timeout=30)
    return done.returncode == 0


def build_images(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the program behind `make images`."""
    command = [sys.executable, str(ROOT / "deploy" / "docker" / "images.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)

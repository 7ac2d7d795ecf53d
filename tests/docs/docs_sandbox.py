"""A sandboxed home for the commands of the docs."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from console_blocks import ROOT

from overfill.process.home import home as cache_folder

PORTS = (7600, 8000)  # as the docs show them


@dataclass(frozen=True)
class Sandbox:
    """A home folder with a copy of the checkout, in which a reader would type."""

    home: Path
    checkout: Path
    environment: dict[str, str]


def fill_cache(home: Path) -> None:
    """Gives ``home`` the pairs that this machine has prepared, so that they are not built again.

    Files are hard links where the file system allows them. Programs replace files of the cache, and write into none.
    """
    cache, target = cache_folder(), home / ".cache" / "overfill"
    # A fresh machine prepares the default pair here, once for the console blocks and the examples.
    subprocess.run([Path(sys.prefix) / "bin" / "overfill", "pair", "path", "default"], check=True, capture_output=True)
    target.mkdir(parents=True)
    # Containers that run have devices in their folders. A copy of /dev/full never ends.
    wanted = [each for each in cache.iterdir() if each.name != "containers"]
    if subprocess.run(["cp", "-al", *wanted, target], capture_output=True).returncode != 0:
        shutil.rmtree(target)
        shutil.copytree(cache, target, symlinks=True, ignore=shutil.ignore_patterns("containers"))


def ports_in_use(patience: float = 60.0) -> list[int]:
    """Returns which of ``PORTS`` are in use, after ``patience`` seconds for a stack that is ending, as Ray's does."""
    end = time.monotonic() + patience
    while (used := _used_ports()) and time.monotonic() < end:
        time.sleep(0.5)
    return used


def _used_ports() -> list[int]:
    def used(port: int) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) == 0

    return [port for port in PORTS if used(port)]


@contextmanager
def new_sandbox(home: Path) -> Iterator[Sandbox]:
    """Yields a fresh copy of the checkout in ``home``, with the environment of the interpreter that runs this."""
    checkout = home / "overfill"
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    files = subprocess.run(listed, cwd=ROOT, capture_output=True, check=True).stdout.split(b"\0")
    for name in (Path(os.fsdecode(each)) for each in files if each):
        if (ROOT / name).is_file():
            (checkout / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, checkout / name)
    (checkout / ".venv").symlink_to(Path(sys.prefix))
    kept = {name: os.environ[name] for name in ("LANG", "TMPDIR", "PYTHONPATH") if name in os.environ}
    environment = {
        "COLUMNS": "100",
        "OMP_NUM_THREADS": "1",
        "PYTHONUNBUFFERED": "1",
        **kept,
        "HOME": str(home),
        "PATH": f"{checkout / '.venv' / 'bin'}:{os.environ['PATH']}",  # how-tos begin in the activated environment
    }
    yield Sandbox(home, checkout, environment)
    shutil.rmtree(checkout)

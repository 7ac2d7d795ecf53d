"""The folder of the Unix sockets by which a worker's ranks find each other while they load. Knows nothing of vLLM."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_PREFIX = "overfill-ranks-"
_MIN_AGE = 60.0
"""Seconds after which a folder without a lock is abandoned. A new one gets its lock at once."""


@contextmanager
def socket_folder() -> Iterator[str]:
    """Yields the path of a new folder that only this user can enter, and removes the folder at the end.

    A worker that is killed while it loads leaves its folder behind. The next worker removes it, because its lock has
    ended with its process.
    """
    _remove_abandoned()
    folder = tempfile.mkdtemp(prefix=_PREFIX)
    try:
        with _locked(Path(folder)):
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _remove_abandoned() -> None:
    for folder in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        with suppress(OSError):  # in use, of another user, or removed meanwhile
            if time.time() - folder.stat().st_mtime >= _MIN_AGE:
                with _locked(folder):
                    shutil.rmtree(folder)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Holds the lock of ``folder``. Raises OSError if another process holds it, or if ``folder`` is a link."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)

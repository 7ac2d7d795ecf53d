"""Temporary folders that a process removes when it ends; if it was killed, the next process removes them."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

PREFIX = "overfill-"
"""Beginning of the names of these folders, which are in the system's folder for temporary files."""
_HELD = "held"
"""File in a folder that its process locks while it lives."""


def remove_abandoned_folders() -> None:
    """Removes this user's folders whose processes have ended. A folder that was never held stays."""
    for held in Path(tempfile.gettempdir()).glob(f"{PREFIX}*/{_HELD}"):
        with contextlib.suppress(OSError):
            if held.parent.lstat().st_uid == os.getuid():
                _lock(held).close()  # fails while the process lives
                shutil.rmtree(held.parent, ignore_errors=True)


def hold_folder(folder: Path) -> IO[bytes]:
    """Returns a file that this process keeps open while it needs the folder."""
    starting = folder / "starting"
    starting.touch()
    held = _lock(starting)
    starting.rename(folder / _HELD)  # locked before another process can find it
    return held


@contextlib.contextmanager
def temporary_folder(kind: str) -> Iterator[Path]:
    """Makes and holds a folder that only this user can enter, and removes it at the end. ``kind`` is in its name."""
    remove_abandoned_folders()
    temporary = tempfile.TemporaryDirectory(prefix=f"{PREFIX}{kind}-", ignore_cleanup_errors=True)
    with temporary as name, hold_folder(Path(name)):
        yield Path(name)


def _lock(path: Path) -> IO[bytes]:
    """Returns the locked file. Raises OSError if another process has locked it."""
    with contextlib.ExitStack() as opened:
        file = opened.enter_context(path.open("rb"))
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        opened.pop_all()
        return file

"""Lets the worker processes of one machine take turns at its cores, through a file that they share.

A step has all cores, and no other step of these workers runs meanwhile. Steps that run at once would each have threads
that wait at barriers for one without a core.

Turns are two record locks on the file. The process that holds the second lock steps, and the one that holds the first
lock is next, so two busy workers alternate. The kernel frees the locks of a process that ends.
"""

from __future__ import annotations

import fcntl
import time
from pathlib import Path

PATIENCE = 1.0
"""Seconds after which a worker steps although another one has the turn, which may be frozen. From then on it does not
wait, until the turn is free again."""

_POLL = 0.001  # seconds; a lock that is waited for in the kernel cannot be given up
_NEXT, _STEPPING = 0, 1  # bytes of the file


class SharedCores:
    """One process's turns. Use it as a context manager around each step.

    Args:
        path: the file; its content does not matter.

    Raises:
        OSError: the file cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("r+b")
        self._patience, self._has_turn = PATIENCE, False

    def close(self) -> None:
        """Closes the file, which frees the turn."""
        self._file.close()

    def __enter__(self) -> None:
        deadline = time.monotonic() + self._patience
        self._has_turn = self._lock(_NEXT, deadline) and self._lock(_STEPPING, deadline)
        self._unlock(_NEXT)
        self._patience = PATIENCE if self._has_turn else 0.0

    def __exit__(self, *_: object) -> None:
        if self._has_turn:
            self._unlock(_STEPPING)

    def _lock(self, byte: int, deadline: float) -> bool:
        while True:
            try:
                fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, byte)
            except (BlockingIOError, PermissionError):
                if time.monotonic() >= deadline:
                    return False
                time.sleep(_POLL)
            else:
                return True

    def _unlock(self, byte: int) -> None:
        fcntl.lockf(self._file, fcntl.LOCK_UN, 1, byte)

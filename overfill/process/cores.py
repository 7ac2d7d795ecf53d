"""Divides a machine's cores among the worker processes that compute at the moment, through a file that they share.

Each process has a slot in the file: its id, and whether it is in a step. A step only reads and writes memory; there is
no lock. Two steps that begin at the same instant may both take all cores, until the next step of either.
"""

from __future__ import annotations

import fcntl
import mmap
import os
from pathlib import Path

_SLOTS = 64
_SLOT = 2  # numbers of a slot, 32 bits each: process id, 1 in a step
SIZE = 4 * _SLOT * _SLOTS
"""Bytes of the file, at first all zero."""


class SharedCores:
    """One process's view of the file. Use it as a context manager around each step; entering returns the threads.

    Args:
        path: the file, of ``SIZE`` bytes.
        threads: maximum number of threads of a step.
        cores: cores that the processes share; None means those on which this process may run.

    Raises:
        OSError: the file cannot be read, is too small, or has no free slot.
    """

    def __init__(self, path: Path, threads: int, cores: int | None = None) -> None:
        self._threads = threads
        self._cores = cores or len(os.sched_getaffinity(0))
        with path.open("r+b") as file:
            if os.fstat(file.fileno()).st_size < SIZE:
                raise OSError(f"{path} has fewer than {SIZE} bytes")
            self._slots = memoryview(mmap.mmap(file.fileno(), SIZE)).cast("I")
            fcntl.flock(file, fcntl.LOCK_EX)  # so that processes that start together take different slots
            try:
                self._own = self._take_slot(path)
            finally:
                fcntl.flock(file, fcntl.LOCK_UN)  # closing does not unlock it, because the map keeps it open

    def _take_slot(self, path: Path) -> int:
        for own in range(0, _SLOT * _SLOTS, _SLOT):
            if not self._slots[own] or not _runs(self._slots[own]):
                self._slots[own + 1] = 0
                self._slots[own] = os.getpid()
                return own
        raise OSError(f"{path} has no free slot; it has {_SLOTS}")

    def __enter__(self) -> int:
        slots = self._slots
        slots[self._own + 1] = 1
        computing = 1
        for slot in range(0, _SLOT * _SLOTS, _SLOT):
            if not slots[slot]:  # slots are taken from the first on, and never given back
                break
            # A process that was killed in a step has left its mark.
            if slots[slot + 1] and slot != self._own and _runs(slots[slot]):
                computing += 1
        return max(1, min(self._threads, self._cores // computing))

    def __exit__(self, *_: object) -> None:
        self._slots[self._own + 1] = 0


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True

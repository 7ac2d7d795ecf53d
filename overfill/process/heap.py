"""Gives memory back to the system that glibc keeps free for later, such as that of large requests."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

GROWTH = 32 << 20
"""Bytes by which the process must have grown since the last time, as giving memory back takes some milliseconds."""

_STATM = Path("/proc/self/statm")


class Heap:
    """The heap of this process. Does nothing on systems without Linux's ``/proc`` and glibc's ``malloc_trim``."""

    def __init__(self) -> None:
        self._trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if _STATM.exists() else None
        self._least = self._resident()

    def has_grown(self) -> bool:
        """Returns True if ``trim`` is worth its time."""
        resident = self._resident()
        self._least = min(self._least, resident)
        return resident > self._least + GROWTH

    def trim(self) -> None:
        """Gives free memory back. Call it in a thread: it does not hold the interpreter's lock."""
        if self._trim is not None:
            self._trim(0)
        self._least = self._resident()

    def _resident(self) -> int:
        return 0 if self._trim is None else int(_STATM.read_text().split()[1]) * os.sysconf("SC_PAGESIZE")

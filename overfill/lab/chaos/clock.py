"""Wall clocks that can be set for one process at a time: a small library that is preloaded, and the files it looks at.

It covers everything that a process reads through the C library: Python's ``time.time`` and ``datetime``, gRPC's and
torch's clocks, and timed waits on them. Monotonic clocks stay, as they do when a machine's clock is set.
"""

from __future__ import annotations

import struct
import subprocess
import sys
from pathlib import Path

from overfill.process.compiled import find_compiler

_SOURCE = Path(__file__).with_name("clock.c")


class Clocks:
    """The clocks of a trial's processes. ``folder`` takes the library and a file for each process.

    Attributes:
        available: whether there is a C compiler; without one no clock can be set.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._library = folder / "clock.so"
        compiler = find_compiler(("cc", "gcc", "clang"))
        self.available = sys.platform == "linux" and compiler is not None
        if self.available:
            assert compiler is not None
            command = [compiler, "-O2", "-shared", "-fPIC", str(_SOURCE), "-o", str(self._library), "-ldl", "-pthread"]
            subprocess.run(command, check=True, capture_output=True, timeout=60)

    def environment(self, name: str) -> dict[str, str]:
        """For a process that begins, with the right time."""
        if not self.available:
            return {}
        self.jump(name, 0.0)
        return {"LD_PRELOAD": str(self._library), "OVERFILL_CHAOS_CLOCK": str(self._file(name))}

    def jump(self, name: str, seconds: float) -> None:
        """From now on the process is that much ahead of the machine, at once."""
        with self._file(name).open("r+b" if self._file(name).exists() else "w+b") as file:
            file.write(struct.pack("=q", round(seconds * 1e9)))

    def _file(self, name: str) -> Path:
        return self._folder / f"{name}.clock"

"""Sets the wall clock of a single process: a small preloaded library adds an offset that it reads from a file.

The library covers everything that a process reads through the C library: Python's ``time.time`` and ``datetime``, the
clocks of gRPC and torch, and timed waits on them. Monotonic clocks do not change, as when a machine's clock is set.
"""

from __future__ import annotations

import struct
import subprocess
import sys
from pathlib import Path

from overfill.process.compiled import C_COMPILERS, find_compiler

_SOURCE = Path(__file__).with_name("clock.c")


class Clocks:
    """The wall clocks of a trial's processes. ``folder`` holds the compiled library and one file per process.

    Attributes:
        available: True on Linux with a C compiler. Otherwise no clock can be set.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._library = folder / "clock.so"
        compiler = find_compiler(C_COMPILERS) if sys.platform == "linux" else None
        self.available = compiler is not None
        if compiler is not None:
            command = [compiler, "-O2", "-shared", "-fPIC", str(_SOURCE), "-o", str(self._library), "-ldl", "-pthread"]
            subprocess.run(command, check=True, capture_output=True, timeout=60)

    def environment(self, name: str) -> dict[str, str]:
        """Returns the variables for a process that is about to start, and sets its clock to the machine's."""
        if not self.available:
            return {}
        self.jump(name, 0.0)
        return {"LD_PRELOAD": str(self._library), "OVERFILL_CHAOS_CLOCK": str(self._file(name))}

    def jump(self, name: str, seconds: float) -> None:
        """Sets the process's clock ``seconds`` ahead of the machine's, at once."""
        with self._file(name).open("r+b" if self._file(name).exists() else "w+b") as file:
            file.write(struct.pack("=q", round(seconds * 1e9)))

    def _file(self, name: str) -> Path:
        return self._folder / f"{name}.clock"

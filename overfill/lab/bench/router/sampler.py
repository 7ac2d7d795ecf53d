"""Runs a module and samples where its CPU time goes (``overfill bench router --profile``).

``python -m overfill.lab.bench.router.sampler FILE MODULE ARGUMENTS`` runs MODULE as ``__main__``. SIGUSR1 starts the
samples and SIGUSR2 writes the table to FILE. The kernel sends SIGPROF by CPU time of the whole process, all threads
together, at most once per tick of the machine (1 to 10 ms). The handler notes the stack of the main thread. C code
counts as the Python function that called it. While the main thread waits in ``select``, the CPU time is that of gRPC's
threads.
"""

from __future__ import annotations

import runpy
import signal
import sys
from collections import Counter
from pathlib import Path
from types import CodeType, FrameType

_INTERVAL = 0.001
"""Seconds of CPU time between samples. The kernel rounds them up to its ticks."""

_ROWS = 60
"""Functions in each half of the table."""


class Sampler:
    """Counts the functions on the main thread's stack."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._samples = 0
        self._wakeup = -1
        self._own: Counter[CodeType] = Counter()
        self._total: Counter[CodeType] = Counter()

    def install(self) -> None:
        """Installs the handlers of the three signals."""
        signal.signal(signal.SIGPROF, self._sample)
        signal.signal(signal.SIGUSR1, self._begin)
        signal.signal(signal.SIGUSR2, self._end)

    def table(self) -> str:
        """The functions with the most CPU time, by own time and with callees, in percent of all samples."""
        lines = [f"{self._samples} samples"]
        for title, counts in (("own time", self._own), ("with callees", self._total)):
            lines.append(f"\n{title}")
            shares = counts.most_common(_ROWS)
            lines += [f"{100 * count / self._samples:5.1f}%  {_name(code)}" for code, count in shares]
        return "\n".join(lines) + "\n"

    def _begin(self, number: int, frame: FrameType | None) -> None:
        # asyncio's descriptor would wake the loop for every sample.
        self._wakeup = signal.set_wakeup_fd(-1)
        signal.setitimer(signal.ITIMER_PROF, _INTERVAL, _INTERVAL)

    def _sample(self, number: int, frame: FrameType | None) -> None:
        if frame is None:
            return
        self._samples += 1
        self._own[frame.f_code] += 1
        seen = set()
        while frame is not None:
            seen.add(frame.f_code)
            frame = frame.f_back
        self._total.update(seen)

    def _end(self, number: int, frame: FrameType | None) -> None:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.set_wakeup_fd(self._wakeup)
        whole = self._file.with_suffix(".part")
        whole.write_text(self.table())
        whole.replace(self._file)
        self._samples = 0
        self._own.clear()
        self._total.clear()


def _name(code: CodeType) -> str:
    return f"{code.co_qualname} ({'/'.join(Path(code.co_filename).parts[-3:])}:{code.co_firstlineno})"


if __name__ == "__main__":
    Sampler(Path(sys.argv[1])).install()
    sys.argv = sys.argv[2:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)

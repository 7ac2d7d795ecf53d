"""CPU time of other processes, and the processes that a program consists of."""

from __future__ import annotations

import time

import psutil


def cpu_seconds(*processes: int) -> float:
    """CPU time of processes, all threads together, from the kernel's clock of each process in nanoseconds."""
    # The id of the clock is the one that clock_getcpuclockid(3) returns.
    return sum(time.clock_gettime((~process << 3) | 2) for process in processes)


def family(process: int) -> tuple[int, ...]:
    """Returns a process and all its descendants."""
    return (process, *(child.pid for child in psutil.Process(process).children(recursive=True)))

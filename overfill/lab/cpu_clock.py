"""CPU time of other processes."""

from __future__ import annotations

import time


def cpu_seconds(pid: int) -> float:
    """CPU time of a process, all threads together, from the kernel's clock of that process in nanoseconds."""
    return time.clock_gettime((~pid << 3) | 2)  # the id that clock_getcpuclockid(3) returns

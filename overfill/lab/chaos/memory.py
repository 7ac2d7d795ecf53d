"""Samples memory and open files of a trial's processes, and summarises their growth."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import median_high

import psutil

from overfill.lab.chaos.stack import ranks_of
from overfill.stack.child import Child

_INTERVAL = 2.0  # seconds between samples
_WARM_UP = 60.0  # seconds after a process's start that are left out: pools and caches fill
_MIN_LIFETIME = 180.0  # seconds after the warm-up; growth over a shorter time says nothing


@dataclass(frozen=True, slots=True)
class MemorySample:
    """One process at one moment: seconds since the trial began, resident bytes, open files."""

    at: float
    name: str
    pid: int
    rss: int
    files: int


@dataclass(frozen=True, slots=True)
class ProcessLifetime:
    """Memory and open files of one process, from the end of its warm-up to its end.

    Attributes:
        minutes: Time between the two.
        mib, files: Medians of the last third.
        more_mib, more_files: Difference between the medians of the first and the last third.
    """

    name: str
    minutes: float
    mib: float
    more_mib: float
    files: int
    more_files: int


async def watch(processes: Callable[[], Iterable[Child]], samples: list[MemorySample]) -> None:
    """Appends to ``samples`` every 2 s until it is cancelled."""
    began = time.monotonic()
    while True:
        for child in processes():
            with contextlib.suppress(psutil.Error):  # the process has just ended
                ranks = {f"{child.name}, rank {number}": rank for number, rank in enumerate(ranks_of(child.pid))}
                at = time.monotonic() - began
                for name, process in ({child.name: psutil.Process(child.pid)} | ranks).items():
                    samples.append(MemorySample(at, name, process.pid, process.memory_info().rss, process.num_fds()))
        await asyncio.sleep(_INTERVAL)


def lifetimes(samples: Sequence[MemorySample]) -> list[ProcessLifetime]:
    """Summarises every process that ran for at least 3 minutes after its warm-up. Sorted by name, longest first."""
    by_process: dict[tuple[str, int], list[MemorySample]] = defaultdict(list)
    for sample in samples:
        by_process[sample.name, sample.pid].append(sample)
    found = []
    for (name, _), of_process in by_process.items():
        warm = [sample for sample in of_process if sample.at - of_process[0].at >= _WARM_UP]
        if not warm or warm[-1].at - warm[0].at < _MIN_LIFETIME:
            continue
        third = max(1, len(warm) // 3)
        (rss, late_rss), (files, late_files) = (
            [median_high(getattr(sample, number) for sample in part) for part in (warm[:third], warm[-third:])]
            for number in ("rss", "files")
        )
        minutes = round((warm[-1].at - warm[0].at) / 60, 1)
        mib, more_mib = (round(size / 2**20, 1) for size in (late_rss, late_rss - rss))
        found.append(ProcessLifetime(name, minutes, mib, more_mib, late_files, late_files - files))
    return sorted(found, key=lambda lifetime: (lifetime.name, -lifetime.minutes))

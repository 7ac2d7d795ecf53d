"""Samples memory and open files of a trial's processes, and summarises their growth."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from statistics import median_high
from typing import Any

import psutil

from overfill.lab.chaos.stack import ranks_of
from overfill.stack.child import Child

_INTERVAL = 2.0  # seconds between samples
_WARM_UP = 60.0  # seconds after a process's start that are left out: pools and caches fill
_MIN_LIFETIME = 180.0  # seconds after the warm-up; growth over a shorter time says nothing

Sample = tuple[float, float, int]
"""A process at one moment: seconds on the monotonic clock, resident MiB, open files."""

ProcessKey = tuple[str, int]
"""Name and id of a process."""


async def watch(processes: Callable[[], Iterable[Child]], samples: MutableMapping[ProcessKey, list[Sample]]) -> None:
    """Adds to ``samples`` every 2 s until it is cancelled."""
    while True:
        for child in processes():
            with contextlib.suppress(psutil.Error):  # the process has just ended
                ranks = {f"{child.name}, rank {number}": rank for number, rank in enumerate(ranks_of(child.pid))}
                for name, process in ({child.name: psutil.Process(child.pid)} | ranks).items():
                    sample = time.monotonic(), process.memory_info().rss / 2**20, process.num_fds()
                    samples.setdefault((name, process.pid), []).append(sample)
        await asyncio.sleep(_INTERVAL)


def growth(samples: Mapping[ProcessKey, Sequence[Sample]]) -> list[dict[str, Any]]:
    """Returns a row for each process that ran for at least 3 minutes after its warm-up, by name, the longest first.

    ``mib`` and ``files`` are medians of the last third of that time; ``more_mib`` and ``more_files`` are their
    difference to those of the first third.
    """
    rows: list[dict[str, Any]] = []
    for (name, _), of_process in samples.items():
        warm = [sample for sample in of_process if sample[0] - of_process[0][0] >= _WARM_UP]
        if warm and (seconds := warm[-1][0] - warm[0][0]) >= _MIN_LIFETIME:
            third = max(1, len(warm) // 3)
            (_, mib, files), (_, early_mib, early_files) = (
                [median_high(values) for values in zip(*part, strict=True)] for part in (warm[-third:], warm[:third])
            )
            more = {"more_mib": round(mib - early_mib, 1), "files": files, "more_files": files - early_files}
            rows.append({"name": name, "minutes": round(seconds / 60, 1), "mib": round(mib, 1), **more})
    return sorted(rows, key=lambda row: (row["name"], -row["minutes"]))

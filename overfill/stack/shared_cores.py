"""Gives workers that have more threads than this machine has cores a file through which they take turns."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from overfill.stack.placed import PlacedStack


def share_cores(placed: PlacedStack, folder: Path) -> PlacedStack:
    """Returns ``placed`` with a file in ``folder`` in the workers' settings.

    Returns it as it is if the workers compute nothing or have cores of their own.
    """
    if placed.spec.mock or not are_shared(worker.config.threads for worker in placed.workers):
        return placed
    shared = {"shared_cores": new_file(folder)}
    return placed.with_configs(
        lambda worker: worker.config if worker.config.shared_cores else worker.config.model_copy(update=shared)
    )


def are_shared(threads: Iterable[int]) -> bool:
    """True if workers with these numbers of threads need to take turns at this machine's cores."""
    counts = list(threads)
    return len(counts) > 1 and sum(counts) > len(os.sched_getaffinity(0))


def new_file(folder: Path) -> Path:
    """Makes the file through which workers take turns."""
    path = folder / "cores"
    path.touch(0o600)
    return path

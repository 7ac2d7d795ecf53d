"""Memory that this process may still allocate, on the machine and in the control groups (cgroups) of its container."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import psutil

_ROOT = Path("/sys/fs/cgroup")
_OWN = Path("/proc/self/cgroup")


def available_memory() -> int:
    """Returns the bytes of memory that are free on this machine, or fewer if a cgroup leaves fewer to this process."""
    return min([psutil.virtual_memory().available, *_left_in_cgroups()])


def _left_in_cgroups() -> Iterator[int]:
    try:
        groups = _OWN.read_text().splitlines()
    except OSError:
        return  # not Linux
    for group in groups:
        _, controllers, path = group.split(":", 2)
        if not controllers:
            mount, limit, used, cached = _ROOT, "memory.max", "memory.current", "inactive_file"
        elif controllers == "memory":  # version 1
            mount, limit, used = _ROOT / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
            cached = "total_inactive_file"
        else:
            continue
        # A container has its own cgroup at the mount; the path may be that in the host's tree, which it does not see.
        names = path.strip("/").split("/")
        for folder in (mount.joinpath(*names[:depth]) for depth in range(len(names) + 1)):
            try:
                most, now = int((folder / limit).read_text()), int((folder / used).read_text())
                statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            except (OSError, ValueError):
                continue  # no such folder, or no limit
            # The kernel drops unused pages of files before it refuses memory.
            yield max(0, most - now + int(statistics.get(cached, 0)))

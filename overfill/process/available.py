"""Memory that this process may still allocate, within the limit of its container."""

from __future__ import annotations

import re
from pathlib import Path

import psutil

# Files of the control group, as a container sees them: its limit, its use, and its statistics with the cache of files.
_VERSIONS = (
    ("memory.max", "memory.current", "memory.stat", "inactive_file"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "total_inactive_file"),
)


def available_memory(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes that are available on this machine, or in this container if its limit leaves fewer.

    Cached files that nothing has used lately count as available, because the kernel drops them first: a worker that has
    just read its weights has gigabytes of them.
    """
    available: int = psutil.virtual_memory().available
    for limit, used, statistics, cached in _VERSIONS:
        try:
            texts = [(cgroup / name).read_text() for name in (limit, used, statistics)]
            free = int(texts[0]) - int(texts[1])
        except (OSError, ValueError):  # another version of control groups, or no limit ("max")
            continue
        if found := re.search(rf"^{cached} (\d+)$", texts[2], re.MULTILINE):
            free += int(found[1])
        available = min(available, max(0, free))
    return available

"""The names that a worker and its ranks share, as the operating system knows them."""

from __future__ import annotations

from pathlib import Path

from listening import owned


def names_of(pids):
    """Returns what these processes have open under a name: shared memory, semaphores and Unix sockets."""
    inodes, found = owned(pids), set()
    for line in Path("/proc/net/unix").read_text().splitlines()[1:]:
        fields = line.split(maxsplit=7)
        if len(fields) == 8 and fields[6] in inodes:
            found.add(fields[7])
    for pid in pids:
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            _, separator, name = line.partition("/dev/shm/")
            if separator:
                found.add(f"/dev/shm/{name.removesuffix(' (deleted)')}")
    return found


def still_named(names):
    """Returns those of ``names`` that exist, the folders of sockets among them."""
    sockets = Path("/proc/net/unix").read_text().split()
    paths = {Path(name) for name in names if name.startswith("/")}
    paths |= {path.parent for path in paths if path.parent.name.startswith("overfill-ranks-")}
    return {str(path) for path in paths if path.exists()} | {name for name in names if name in sockets}

"""Finds what keeps this process from reading a file, for error messages. A container's user often owns nothing."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path


def refusal(path: Path) -> str:
    """Returns which folder or file this process may not read, of ``path``, all above and all below it, and what to do.

    Empty if it may read all of them, or some are missing.
    """
    for place, needed in _places(path.absolute()):
        if place.exists() and not os.access(place, needed):
            status = place.stat()
            groups = ", ".join(map(str, sorted({os.getegid(), *os.getgroups()})))
            return (
                f"user {os.geteuid()} (groups {groups}) may not read {place}, whose owner is "
                f"{status.st_uid}:{status.st_gid} and whose mode is {status.st_mode & 0o7777:04o}; change one of these"
            )
    return ""


def _places(path: Path) -> Iterator[tuple[Path, int]]:
    for folder in reversed(path.parents):
        if folder.is_dir():
            yield folder, os.X_OK
    if not path.is_dir():
        yield path, os.R_OK
        return
    yield path, os.R_OK | os.X_OK
    # os.walk does not visit folders that it may not read, so each is yielded with the folder above it.
    seen = set()
    for below, folders, names in os.walk(path, followlinks=True):
        real = Path(below).resolve()
        if real in seen:  # links form a circle
            folders.clear()
            continue
        seen.add(real)
        for name in folders:
            yield Path(below, name), os.R_OK | os.X_OK
        for name in names:
            yield Path(below, name), os.R_OK

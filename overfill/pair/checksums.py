"""Detect damage to a cached folder without hashing all of it every time.

``overfill.making.seal`` records size, modification time and SHA-256 of every file. ``checksums_match`` hashes only the
files whose modification time has changed. Links to folders are not followed: a linked folder has checksums of its own.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

CHECKSUMS_FILE = ".seal.json"


def checksums_match(folder: Path) -> bool:
    """Returns True if ``folder`` has recorded checksums and every file still matches its own."""
    try:
        recorded: dict[str, dict[str, object]] = json.loads((folder / CHECKSUMS_FILE).read_text())
        for name, entry in recorded.items():
            status = (folder / name).stat()
            if status.st_size != entry["size"]:
                return False
            if status.st_mtime_ns != entry["mtime_ns"] and sha256(folder / name) != entry["sha256"]:
                return False
    except (OSError, ValueError, KeyError, AttributeError):
        return False
    return True


def sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()

"""Detect damage to a cached folder without hashing all of it every time.

``record_checksums`` stores size, modification time and SHA-256 of every file. ``checksums_match`` hashes only the files
whose modification time has changed. Neither follows links to folders: the linked folder has checksums of its own.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

CHECKSUMS_FILE = ".seal.json"


def record_checksums(folder: Path) -> None:
    """Records the checksums of all files in ``folder``. Call it last, after every other write."""
    entries = {str(file.relative_to(folder)): _entry(file) for file in _files(folder)}
    (folder / CHECKSUMS_FILE).write_text(json.dumps(entries, indent=1) + "\n")


def update_checksum(folder: Path, name: str) -> None:
    """Records the checksum of the file ``name`` again after an intended change; the others stay as recorded."""
    entries = json.loads((folder / CHECKSUMS_FILE).read_text())
    entries[name] = _entry(folder / name)
    temporary = folder / f"{CHECKSUMS_FILE}.tmp"
    temporary.write_text(json.dumps(entries, indent=1) + "\n")
    os.replace(temporary, folder / CHECKSUMS_FILE)


def checksums_match(folder: Path) -> bool:
    """Returns True if ``folder`` has recorded checksums and every file still matches its own."""
    try:
        recorded: dict[str, dict[str, object]] = json.loads((folder / CHECKSUMS_FILE).read_text())
        for name, entry in recorded.items():
            status = (folder / name).stat()
            if status.st_size != entry["size"]:
                return False
            if status.st_mtime_ns != entry["mtime_ns"] and _sha256(folder / name) != entry["sha256"]:
                return False
    except (OSError, ValueError, KeyError, AttributeError):
        return False
    return True


def _files(folder: Path) -> list[Path]:
    # os.walk does not follow links to folders.
    found = [Path(root) / name for root, _, names in os.walk(folder) for name in names]
    return sorted(file for file in found if file != folder / CHECKSUMS_FILE)


def _entry(file: Path) -> dict[str, object]:
    status = file.stat()
    return {"size": status.st_size, "mtime_ns": status.st_mtime_ns, "sha256": _sha256(file)}


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()

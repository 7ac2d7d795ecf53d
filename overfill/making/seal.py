"""Records the checksums of a cached folder, by which ``overfill.pair.checksums`` detects damage."""

from __future__ import annotations

import json
import os
from pathlib import Path

from overfill.pair.checksums import CHECKSUMS_FILE, sha256


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


def _files(folder: Path) -> list[Path]:
    # os.walk does not follow links to folders.
    found = [Path(root) / name for root, _, names in os.walk(folder) for name in names]
    return sorted(file for file in found if file != folder / CHECKSUMS_FILE)


def _entry(file: Path) -> dict[str, object]:
    status = file.stat()
    return {"size": status.st_size, "mtime_ns": status.st_mtime_ns, "sha256": sha256(file)}

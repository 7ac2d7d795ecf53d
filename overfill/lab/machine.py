"""Describes the machine of a run, so that its figures can be read elsewhere."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

from overfill.version import __version__


def describe_machine() -> dict[str, Any]:
    """Returns the processor (None if unknown), the number of cores that this process may use, and our version.

    In a checkout the version has the commit, with ``-dirty`` where files differ from it.
    """
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    commit = _commit()
    version = f"{__version__} ({commit})" if commit else __version__
    return {"processor": next(names, None), "cores": len(os.sched_getaffinity(0)), "overfill": version}


def _commit() -> str:
    """Returns the commit of the checkout that this package is in; empty if there is none."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return ""
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""

"""Describes the machine of a run, so that its figures can be read elsewhere."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from overfill.version import __version__


def describe_machine() -> dict[str, Any]:
    """Returns the processor (None if unknown), the number of cores that this process may use, and our version."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return {"processor": next(names, None), "cores": len(os.sched_getaffinity(0)), "overfill": __version__}

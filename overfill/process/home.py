"""The cache folder, for prepared pairs and compiled kernels."""

from __future__ import annotations

import os
from pathlib import Path


def home() -> Path:
    """Returns the absolute path of the cache folder: $OVERFILL_HOME, or ~/.cache/overfill."""
    return Path(os.path.abspath(os.environ.get("OVERFILL_HOME") or Path.home() / ".cache" / "overfill"))

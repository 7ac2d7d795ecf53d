"""Where this package keeps what it has made: prepared pairs, compiled kernels."""

from __future__ import annotations

import os
from pathlib import Path


def home() -> Path:
    """The folder of the cache, absolute: $OVERFILL_HOME, or ~/.cache/overfill."""
    return Path(os.path.abspath(os.environ.get("OVERFILL_HOME") or Path.home() / ".cache" / "overfill"))

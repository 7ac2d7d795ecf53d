"""Finds the NVIDIA GPUs of this machine. No torch, which takes seconds to import."""

from __future__ import annotations

import os
import re
from itertools import takewhile
from pathlib import Path

_DEVICES = Path("/dev")
_DRIVER = Path("/proc/driver/nvidia/gpus")


def gpu_count() -> int:
    """Number of GPUs that processes started here may use."""
    return len(visible_gpus())


def visible_gpus() -> list[str]:
    """Names in ``CUDA_VISIBLE_DEVICES`` of the GPUs that processes started here may use.

    A container has the device files of its own GPUs only. On a machine that has not used its GPUs since it started,
    there are none yet, and the driver's list counts.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    files = [path for path in _DEVICES.glob("nvidia*") if re.fullmatch(r"nvidia\d+", path.name)]
    count = len(files) or len(list(_DRIVER.glob("*")))
    if visible is None:
        return [str(index) for index in range(count)]
    # CUDA ignores everything after the first device that does not exist.
    return list(takewhile(lambda name: name not in ("", "-1"), map(str.strip, visible.split(","))))[:count]

"""Describes the machine of a run, so that its figures can be read elsewhere."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

from overfill.version import __version__

if TYPE_CHECKING:
    import torch

_ROOT = Path(__file__).parents[2]


def describe_machine() -> dict[str, Any]:
    """Returns the processor (None if unknown), the number of cores that this process may use, and our version.

    In a checkout the version has the commit, with ``-dirty`` where files differ from it.
    """
    commit = ""
    if (_ROOT / ".git").exists():
        commit = _output("git", "-C", str(_ROOT), "describe", "--always", "--dirty", "--exclude=*")
    version = f"{__version__} ({commit})" if commit else __version__
    return {"processor": _processor(), "cores": len(os.sched_getaffinity(0)), "overfill": version}


def describe_device(device: torch.device) -> dict[str, Any]:
    """Returns the device and torch's version; of a GPU also its memory in bytes, its driver and CUDA's version."""
    import torch

    found = {"torch": torch.__version__, "device": str(device), "device_name": _processor()}
    if device.type != "cuda":
        return found
    gpu = torch.cuda.get_device_properties(device)
    drivers = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").splitlines()
    return found | {
        "device_name": gpu.name,
        "device_memory": gpu.total_memory,
        "compute_capability": f"{gpu.major}.{gpu.minor}",
        "cuda": torch.version.cuda,
        "driver": next(iter(drivers), None),
    }


def _processor() -> str | None:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return None
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), None)


def _output(*command: str) -> str:
    """Returns what a program prints; empty if it fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""

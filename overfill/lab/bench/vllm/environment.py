"""Describes the machine and the versions of a run, so that a file of figures can be read elsewhere."""

from __future__ import annotations

import os
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from overfill.engine.vllm_release import TESTED_RANGE, installed, untested_warning
from overfill.version import __version__


def describe_environment(device: torch.device) -> dict[str, Any]:
    """Versions, and the device with its driver. ``vllm_tested`` is True for a release of the tested range."""
    release = installed()
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "overfill": __version__,
        "vllm": str(release),
        "vllm_tested_range": TESTED_RANGE,
        "vllm_tested": untested_warning(release) is None,
        "torch": torch.__version__,
        "device": str(device),
        **(_gpu(device) if device.type == "cuda" else _cpu()),
    }


def _gpu(device: torch.device) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(device)
    return {
        "device_name": properties.name,
        "device_memory": properties.total_memory,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "cuda": torch.version.cuda,
        "driver": _driver(),
        "cores": len(os.sched_getaffinity(0)),
    }


def _driver() -> str | None:
    """Version of NVIDIA's driver; None if ``nvidia-smi`` does not tell."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        output = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return next(iter(output.splitlines()), None)


def _cpu() -> dict[str, Any]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return {"device_name": next(names, None), "cores": len(os.sched_getaffinity(0))}

"""Describes the machine and the versions of a run, so that a file of figures can be read elsewhere."""

from __future__ import annotations

import subprocess
from datetime import UTC, datetime
from typing import Any

import torch

from overfill.engine.vllm_release import TESTED_RANGE, installed, untested_warning
from overfill.lab.machine import describe_machine


def describe_environment(device: torch.device) -> dict[str, Any]:
    """Versions, and the device with its driver. ``vllm_tested`` is True for a release of the tested range."""
    release, machine = installed(), describe_machine()
    found = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        **machine,
        "vllm": str(release),
        "vllm_tested_range": TESTED_RANGE,
        "vllm_tested": untested_warning(release) is None,
        "torch": torch.__version__,
        "device": str(device),
        "device_name": machine["processor"],
    }
    if device.type != "cuda":
        return found
    gpu = torch.cuda.get_device_properties(device)
    return found | {
        "device_name": gpu.name,
        "device_memory": gpu.total_memory,
        "compute_capability": f"{gpu.major}.{gpu.minor}",
        "cuda": torch.version.cuda,
        "driver": _driver(),
    }


def _driver() -> str | None:
    """Version of NVIDIA's driver; None if ``nvidia-smi`` does not tell."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        output = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return next(iter(output.splitlines()), None)

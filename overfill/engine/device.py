"""Devices: their names and dtypes, and a thread's settings. CUDA keeps a device per thread, initially ``cuda:0``."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

from overfill.errors import InvalidRequest, OverfillError
from overfill.kv.spec import DTypeName
from overfill.process.memory import freed_memory_kept

_MAX_KEPT_BYTES = 64 << 20
"""Maximum size of a freed allocation that the process keeps instead of returning it to the system."""


class NotEnoughMemory(OverfillError):
    """The device cannot hold weights, steps and KV cache, or the KV cache cannot hold the longest request."""


def resolve_device(device: str) -> torch.device:
    """Turns a device's name into a device; a CUDA device always gets a number.

    ``auto`` means the first CUDA device if there is one, else the CPU.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise InvalidRequest("device", f"{device} needs a CUDA device, but torch finds none; use cpu or auto")
    return torch.device("cuda:0" if device == "cuda" else device)


def native_dtype(device: torch.device) -> DTypeName:
    """The dtype in which ``device`` computes fastest: bfloat16, if it has instructions for it.

    Otherwise float16 on a GPU (before Ampere), and float32 on a CPU, where bfloat16 is several times slower.
    """
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.get_device_capability(device) >= (8, 0) else "float16"
    # Older torch releases do not report capabilities; float32 runs everywhere.
    capabilities: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    return "bfloat16" if capabilities.get("avx512_bf16") else "float32"


def use_device(device: torch.device) -> None:
    """Makes ``device`` the calling thread's current device. Does nothing for a CPU."""
    if device.type == "cuda":
        torch.cuda.set_device(device)


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """Context manager that makes ``device`` the calling thread's current device. Does nothing for a CPU."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def device_executor(threads: int, name: str, device: torch.device) -> ThreadPoolExecutor:
    """A thread pool whose threads use ``device``."""
    return ThreadPoolExecutor(threads, name, use_device, (device,))


@contextmanager
def cpu_settings(threads: int) -> Iterator[None]:
    """Lets torch compute with ``threads`` CPU threads and, until exit, keeps freed memory for the next KV messages.

    A KV message in fresh memory takes twice as long.
    """
    torch.set_num_threads(threads)
    torch.set_num_interop_threads(1)
    with freed_memory_kept(_MAX_KEPT_BYTES):
        yield

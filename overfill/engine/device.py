"""Devices: their names and dtypes, and a thread's settings. CUDA keeps a device per thread, initially ``cuda:0``.

A device of None means an engine that needs no torch: functions that take one import torch on use.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from typing import TYPE_CHECKING

from overfill.errors import InvalidRequest, OverfillError
from overfill.kv.spec import DTypeName
from overfill.kv.store import DeviceEvent
from overfill.process.memory import freed_memory_kept

if TYPE_CHECKING:
    import torch

_MAX_KEPT_BYTES = 64 << 20
"""Maximum size of a freed allocation that the process keeps instead of returning it to the system."""


class NotEnoughMemory(OverfillError):
    """The device cannot hold weights, steps and KV cache, or the KV cache cannot hold the longest request."""


def resolve_device(device: str) -> torch.device:
    """Turns a device's name into a device; a CUDA device always gets a number.

    ``auto`` means the first CUDA device if there is one, else the CPU.
    """
    import torch

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise InvalidRequest("device", f"{device} needs a CUDA device, but torch finds none; use cpu or auto")
    return torch.device("cuda:0" if device == "cuda" else device)


def native_dtype(device: torch.device) -> DTypeName:
    """The dtype in which ``device`` computes fastest: bfloat16, if it has instructions for it.

    Otherwise float16 on a GPU (before Ampere), and float32 on a CPU, where bfloat16 is several times slower.
    """
    import torch

    if device.type == "cuda":
        return "bfloat16" if torch.cuda.get_device_capability(device) >= (8, 0) else "float16"
    # Older torch releases do not report capabilities; float32 runs everywhere.
    capabilities: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    return "bfloat16" if capabilities.get("avx512_bf16") else "float32"


def on_cpu(device: torch.device | None) -> bool:
    """True if steps end before the function that runs them returns."""
    return device is None or device.type == "cpu"


def use_device(device: torch.device | None) -> None:
    """Makes ``device`` the calling thread's current device. Does nothing for a CPU."""
    if device is not None and device.type == "cuda":
        import torch

        torch.cuda.set_device(device)


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """Context manager that makes ``device`` the calling thread's current device. Does nothing for a CPU."""
    if device.type != "cuda":
        return nullcontext()
    import torch

    return torch.cuda.device(device)


def is_out_of_memory(error: Exception) -> bool:
    """True if ``error`` is torch's for a device without enough memory."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(error, torch.OutOfMemoryError)


def use_threads(threads: int) -> None:
    """Lets torch compute with ``threads`` CPU threads in the calling thread."""
    _thread_setter()(threads)


@cache
def _thread_setter() -> Callable[[int], None]:
    """torch's function as it was on the first use: vLLM replaces torch's attribute."""
    from torch import set_num_threads

    return set_num_threads


def record_event(device: torch.device | None) -> DeviceEvent | None:
    """Records an event after all that this thread has launched on ``device`` so far; None without CUDA.

    The stream is named because an event without one is recorded on the thread's current device, which may be another.
    """
    if device is None or device.type != "cuda":
        return None
    import torch

    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(device))
    return event


def device_executor(threads: int, name: str, device: torch.device | None) -> ThreadPoolExecutor:
    """A thread pool whose threads use ``device``."""
    return ThreadPoolExecutor(threads, name, use_device, (device,))


@contextmanager
def cpu_settings(threads: int | None) -> Iterator[None]:
    """Lets torch compute with ``threads`` CPU threads and, until exit, keeps freed memory for the next KV messages.

    A KV message in fresh memory takes twice as long. With None, torch is neither set nor imported.
    """
    if threads is not None:
        import torch

        use_threads(threads)
        torch.set_num_interop_threads(1)
    with freed_memory_kept(_MAX_KEPT_BYTES):
        yield

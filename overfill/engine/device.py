"""Sets a thread's device and CPU settings. CUDA keeps a current device per thread, initially ``cuda:0``."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

from overfill.process.memory import freed_memory_kept

_MAX_KEPT_BYTES = 64 << 20
"""Maximum size of a freed allocation that the process keeps instead of returning it to the system."""


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

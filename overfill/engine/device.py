"""The device of a thread. CUDA keeps a current device per thread, which is ``cuda:0`` until a thread says otherwise."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

from overfill.process.memory import freed_memory_kept

_MAX_KEPT_BYTES = 64 << 20
"""Largest freed piece of memory that stays with the process."""


def use_device(device: torch.device) -> None:
    """Makes ``device`` the current one of the calling thread. Does nothing for a CPU."""
    if device.type == "cuda":
        torch.cuda.set_device(device)


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """Makes ``device`` the current one of the calling thread for a while. Does nothing for a CPU."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def device_executor(threads: int, name: str, device: torch.device) -> ThreadPoolExecutor:
    """Threads that work with tensors on ``device``."""
    return ThreadPoolExecutor(threads, name, use_device, (device,))


@contextmanager
def cpu_settings(threads: int) -> Iterator[None]:
    """Within, this process computes with ``threads`` CPU threads and keeps the memory that messages of KV take."""
    torch.set_num_threads(threads)
    torch.set_num_interop_threads(1)
    with freed_memory_kept(_MAX_KEPT_BYTES):  # a message of KV in fresh memory takes twice as long
        yield

"""The device of a thread. CUDA keeps a current device per thread, which is ``cuda:0`` until a thread says otherwise."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext

import torch


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

"""How much of a GPU's memory this process may use, if several workers share the GPU."""

from __future__ import annotations

import fcntl
import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from overfill.engine.protocol import VLLM_GPU_SHARE, EngineOptions
from overfill.process import startup

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

_OVERHEAD = 1 << 30  # bytes per process that neither torch nor vLLM counts: the CUDA context, and captured graphs
_VLLM_UTILIZATION = 0.92  # vLLM's default


def free_share(device: torch.device, share: float) -> int:
    """Bytes that this process may still allocate on a GPU of which it has ``share``, even if more are free now.

    The other workers of the GPU may not have taken their shares yet.
    """
    import torch

    free, total = torch.cuda.mem_get_info(device)
    return max(0, min(free, int(total * share) - _OVERHEAD - torch.cuda.memory_reserved(device)))


def vllm_utilization(options: EngineOptions) -> float | None:
    """vLLM's ``gpu_memory_utilization`` for these options; None for its default.

    vLLM starts only where that share of the GPU's memory is free. With ``kv_memory`` it does not size its cache by it.
    """
    if options.device is None or options.device.type != "cuda":
        return None
    if options.kv_memory is not None:
        return VLLM_GPU_SHARE
    if options.gpu_share == 1:
        return None
    import torch

    overhead = _OVERHEAD / torch.cuda.mem_get_info(options.device)[1]
    return max(VLLM_GPU_SHARE, options.gpu_share * _VLLM_UTILIZATION - overhead)


@contextmanager
def loading_turn(options: EngineOptions) -> Iterator[None]:
    """Lets the workers that share a GPU load one after the other. A worker with several ranks needs all their GPUs.

    vLLM measures the memory of its steps by the GPU's free memory, which other workers must not change meanwhile.
    """
    if options.device is None or options.device.type != "cuda" or options.gpu_share == 1:
        yield
        return
    import torch

    first = options.device.index or 0
    devices = range(first, first + options.tensor_parallel_size)
    uuids = sorted(str(torch.cuda.get_device_properties(device).uuid) for device in devices)
    with ExitStack() as turns:
        for uuid in uuids:  # in the same order in all workers, so that no two wait for each other
            turns.enter_context(_turn(uuid))
        yield


@contextmanager
def _turn(uuid: str) -> Iterator[None]:
    """Waits until no other worker loads on the GPU."""
    path = Path(tempfile.gettempdir()) / f"overfill-{os.getuid()}-loading-{uuid}"
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        with startup.once():  # a worker that starts later, alone, does not wait
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                log.info("another worker loads on %s; this one waits for its turn", uuid)
                fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        fcntl.flock(descriptor, fcntl.LOCK_UN)  # closing frees the lock only when no child process has the descriptor
        os.close(descriptor)

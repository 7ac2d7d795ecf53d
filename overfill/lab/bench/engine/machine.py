"""Measures memory bandwidth and matrix rate of this machine, without any model.

Each is the best of several routines, so that one slow routine does not lower the bounds.
"""

from __future__ import annotations

import mmap
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from statistics import median

import torch
import xxhash
from torch.nn.functional import linear

_CPU_BUFFER = 1 << 29  # bytes; many times the size of the largest CPU cache
_DEVICE_BUFFER = 1 << 32
_REPEATS = 3
# Shapes (m, k, n) of matrix products. Which one is fastest depends on the machine.
_CPU_SHAPES = ((2048, 2048, 2048), (1024, 1024, 1024), (512, 4096, 4096), (2048, 576, 3072))
_DEVICE_SHAPES = ((8192, 8192, 8192), (4096, 4096, 4096), (16384, 4096, 8192))


@dataclass(frozen=True, slots=True)
class Machine:
    """Speed of a machine.

    Attributes:
        bandwidth: Bytes read from memory per second.
        matrix_rate: Floating-point operations per second of matrix products in the run's dtype.
    """

    bandwidth: float
    matrix_rate: float


class MachineProbe:
    """Measures a ``Machine`` repeatedly, with the same buffers.

    Args:
        threads: CPU threads that torch uses in this process; the hash in ``bandwidth`` uses the same number.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, threads: int) -> None:
        self._device = device
        self._threads = threads
        on_cpu = device.type == "cpu"
        self._buffer = _host_buffer() if on_cpu else torch.ones(_DEVICE_BUFFER // 4, device=device)
        self._products = [
            (torch.randn(m, k, device=device).to(dtype), torch.randn(n, k, device=device).to(dtype))
            for m, k, n in (_CPU_SHAPES if on_cpu else _DEVICE_SHAPES)
        ]

    def measure(self) -> Machine:
        """Measures bandwidth and matrix rate, in about a second on two cores.

        Memory is read by two sums, a dot product and (on a CPU) one hash per thread. The fastest counts, as does the
        fastest shape of a matrix product.
        """
        floats, integers = self._buffer, self._buffer.view(torch.int64)
        reads: list[Callable[[], object]] = [floats.sum, integers.sum, partial(torch.dot, floats, floats)]
        if self._device.type == "cpu":
            reads.append(self._hash)
        return Machine(
            floats.nbytes / min(map(self._seconds, reads)),
            max(2 * x.numel() * len(w) / self._seconds(partial(linear, x, w)) for x, w in self._products),
        )

    def _hash(self) -> None:
        view = self._buffer.numpy().data.cast("B")
        share = len(view) // self._threads
        with ThreadPoolExecutor(self._threads) as pool:
            list(pool.map(lambda i: xxhash.xxh3_64_intdigest(view[i * share : (i + 1) * share]), range(self._threads)))

    def _seconds(self, run: Callable[[], object]) -> float:
        run()
        times = []
        for _ in range(_REPEATS):
            self._synchronize()
            start = time.perf_counter()
            run()
            self._synchronize()
            times.append(time.perf_counter() - start)
        return median(times)

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def _host_buffer() -> torch.Tensor:
    """A float32 buffer, in huge pages where the system has them.

    With small pages, address translation costs a sixth of the time. Every page is written, because unwritten pages all
    map to the same zero page and would be read from the cache.
    """
    memory = mmap.mmap(-1, _CPU_BUFFER)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # the kernel has no huge pages
            memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.float32).fill_(1)


def median_machine(measured: list[Machine]) -> Machine:
    """Medians of bandwidth and of matrix rate over a run."""
    return Machine(median(m.bandwidth for m in measured), median(m.matrix_rate for m in measured))

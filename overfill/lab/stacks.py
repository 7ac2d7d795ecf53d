"""Starts stacks for measurements, by ``overfill.stack``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from overfill.client import Client
from overfill.lab.cpu_clock import cpu_seconds
from overfill.stack.describe import describe
from overfill.stack.placed import place
from overfill.stack.process_runner import running

Log = Callable[[str, str], None]
"""Called with a process's name and each line of its output."""


@dataclass(frozen=True, slots=True)
class ServedStack:
    """A stack that runs.

    Attributes:
        address: ``host:port`` of its router, for gRPC.
        url: its OpenAI endpoint, including ``/v1``.
        model: name of its model.
        processes: name of each process -> its id; the router is ``router``.
        tiers: name of each worker that decodes -> its tier.
    """

    address: str
    url: str
    model: str
    processes: Mapping[str, int]
    tiers: Mapping[str, str]

    def cpu_seconds(self, tier: str) -> float:
        """Returns the CPU time so far of what serves a tier: the router, the prefill workers, its decode workers."""
        return cpu_seconds(*(id for name, id in self.processes.items() if self.tiers.get(name, tier) == tier))


@contextmanager
def served(pair: Path, *, settings: Mapping[str, Any], log: Log, **shape: Any) -> Iterator[ServedStack]:
    """Starts a stack of one router, and yields it when it is ready. Stops it at the end.

    Args:
        settings: settings of its workers by name.
        shape: further arguments of ``overfill.stack.describe``: workers, threads, tiers.

    Raises:
        StartFailed: a process exited.
    """
    placed = place(describe(pair, http=0, settings={"log_level": "warning", "grace_period": 2, **settings}, **shape))
    with running(placed, log) as stack:
        with Client(stack.addresses[0]) as client:
            model, status = client.models()[0].name, client.status()
        workers = {worker.id: stack.worker(worker.id).pid for worker in placed.workers}
        tiers = {worker.id: worker.tier for worker in placed.workers if worker.tier is not None}
        url, processes = f"http://{status.http_address}/v1", {"router": status.process.pid, **workers}
        yield ServedStack(stack.addresses[0], url, model, processes, tiers)

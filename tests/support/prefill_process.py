"""Starts prefill workers for tests that stand in for the router and the decode worker."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

from listening_registry import ListeningRegistry

from overfill.errors import Unavailable
from overfill.settings.config import PrefillConfig
from overfill.stack.child import Child, stop
from overfill.stack.process_runner import child_environment
from overfill.v1 import registry_pb2

_START_TIMEOUT = 120.0  # seconds

Log = Callable[[str, str], None]


@asynccontextmanager
async def prefill_worker(arguments: Sequence[str], threads: int, log: Log) -> AsyncIterator[registry_pb2.Hello]:
    """Starts a prefill worker process with ``arguments``, waits until it has joined, and stops it at the end.

    Args:
        log: Called with the worker's name and each line of its output.

    Raises:
        Unavailable: The worker did not start.
    """
    registry = ListeningRegistry()
    router = await registry.start()
    try:
        config = PrefillConfig.parse(
            [f"--routers={router}", f"--threads={threads}", "--grace-period=1", "--log-level=warning", *arguments]
        )
        command = [sys.executable, "-m", "services.prefill.main"]
        worker = Child("prefill", command, child_environment({}, threads) | config.environment(), log)
        try:
            yield await _joined(registry, worker)
        finally:
            stop([worker], 5.0)
    finally:
        await registry.stop()


async def _joined(registry: ListeningRegistry, worker: Child) -> registry_pb2.Hello:
    waiting = asyncio.ensure_future(registry.next_worker(_START_TIMEOUT))
    while not waiting.done():
        await asyncio.wait([waiting], timeout=0.2)
        if worker.returncode is not None:
            waiting.cancel()
            raise Unavailable("the prefill worker did not start:\n" + "\n".join(worker.last_lines()))
    return waiting.result()

"""Starts a real router with mock workers behind it, as processes of this machine. No model runs."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from overfill.client import Client, SamplingParams
from overfill.errors import OverfillError
from overfill.stack.child import Child, stop
from overfill.stack.ports import free_ports
from overfill.stack.process_runner import child_environment

_START_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class MockStack:
    """A running stack.

    Attributes:
        grpc, http: The router's addresses.
        router: Process id of the router.
        workers: Process ids of the mock workers.
    """

    grpc: str
    http: str
    router: int
    workers: tuple[int, ...]


@contextmanager
def mock_stack(
    pair: Path,
    max_num_seqs: int,
    *,
    workers: int = 1,
    router: Sequence[str] = (),
    times: Mapping[str, object] | None = None,
    launcher: Sequence[str] = (),
) -> Iterator[MockStack]:
    """Starts a router and mock workers, waits until all serve, and stops them at the end.

    Args:
        max_num_seqs: Maximum concurrent sequences of each worker.
        workers: Number of workers of each stage.
        router: Additional flags of the router.
        times: Arguments of the mock engine, such as its times.
        launcher: Module and arguments that run the router's module; nothing runs it directly.
    """
    grpc, http = (f"127.0.0.1:{port}" for port in free_ports("127.0.0.1", 2))
    shared = [f"--pair={pair}", "--log-level=warning"]
    worker = [
        f"--routers={grpc}",
        f"--max-num-seqs={max_num_seqs}",
        "--engine=mock",
        f"--engine-args={json.dumps(times or {})}",
        *shared,
    ]
    ports = [f"--port={grpc.rpartition(':')[2]}", f"--http={http.rpartition(':')[2]}"]
    expected = [f"--expect-prefill={workers}", f"--expect-decode={workers}"]
    commands = {"router": [*launcher, "services.router.main", *ports, *expected, *router, *shared]}
    for index in range(workers):
        commands[f"prefill-{index}"] = ["services.prefill.main", *worker]
        commands[f"decode-{index}"] = ["services.decode.main", *worker]
    children: list[Child] = []
    try:
        for name, arguments in commands.items():
            children.append(_start_module(name, arguments))
        _wait_until_complete(grpc)
        first, *others = [child.pid for child in children]
        yield MockStack(grpc, http, first, tuple(others))
    finally:
        stop(children[1:], grace=2)  # workers first: they leave the router while it runs
        stop(children[:1], grace=2)


def _start_module(name: str, arguments: Sequence[str]) -> Child:
    """Starts ``python -m ARGUMENTS`` with one thread; its output appears on stderr."""
    command = [sys.executable, "-m", *arguments]
    return Child(name, command, child_environment(os.environ, 1), lambda name, line: print(line, file=sys.stderr))


def _wait_until_complete(address: str) -> None:
    """Waits until all workers have joined, and a request is answered.

    Raises:
        OverfillError: The last request failed, a minute after the start.
    """
    deadline = time.monotonic() + _START_SECONDS
    with Client(address) as client:
        while True:
            try:
                if client.status().complete:
                    client.generate("x", sampling=SamplingParams(max_tokens=1), timeout=5)
                    return
            except OverfillError:
                if time.monotonic() > deadline:
                    raise
            time.sleep(0.1)

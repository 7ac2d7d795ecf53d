"""Starts a real router with mock workers behind it, as processes of this machine. No model runs."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from overfill.cli.processes import Child, stop
from overfill.cli.stack import child_environment, free_ports
from overfill.client import Client, SamplingParams
from overfill.errors import OverfillError

_START_SECONDS = 60.0


@contextmanager
def mock_stack(
    pair: Path, max_num_seqs: int, *, router: Sequence[str] = (), decode: Sequence[str] = ()
) -> Iterator[tuple[str, int]]:
    """Starts a router, a mock prefill worker and a mock decode worker, and stops them at the end.

    Args:
        max_num_seqs: Maximum concurrent sequences of each worker.
        router, decode: Additional flags of the router and of the decode worker.

    Yields:
        The router's gRPC address and its process id.
    """
    address = f"127.0.0.1:{(port := free_ports('127.0.0.1', 1)[0])}"
    common = [f"--pair={pair}", "--log-level=warning"]
    worker = [f"--routers={address}", f"--max-num-seqs={max_num_seqs}", "--mock-kv-blocks=100000", *common]
    commands = {
        "router": ["services.router.main", f"--port={port}", "--http=off", *router, *common],
        "prefill": ["services.mock", "prefill", *worker],
        "decode": ["services.mock", "decode", *worker, *decode],
    }
    children: list[Child] = []
    try:
        for name, arguments in commands.items():
            children.append(start_module(name, arguments))
        wait_until_answering(address)
        yield address, children[0].pid
    finally:
        stop(children, grace=2)


def start_module(name: str, arguments: Sequence[str]) -> Child:
    """Starts ``python -m ARGUMENTS`` with one thread; its output appears on stdout."""
    command = [sys.executable, "-m", *arguments]
    return Child(name, command, child_environment(os.environ, 1), lambda name, line: print(line))


def wait_until_answering(address: str) -> None:
    """Sends short requests until one is answered.

    Raises:
        OverfillError: The last request failed, a minute after the start.
    """
    deadline = time.monotonic() + _START_SECONDS
    with Client(address) as client:
        while True:
            try:
                client.generate("x", sampling=SamplingParams(max_tokens=1), timeout=5)
                return
            except OverfillError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.1)

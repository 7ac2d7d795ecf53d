"""Finds where the router's CPU time goes (``overfill bench router --profile``)."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from tempfile import TemporaryDirectory

from overfill.lab.bench.router.bare_server import SendingPace
from overfill.lab.bench.router.load import LoadProcesses
from overfill.lab.bench.router.windows import CLIENTS, WORKERS, Server, Windows, paced_stack


def profile_router(pair: Path, seconds: float, streams: int, answer: int) -> str:
    """Samples the router's CPU time during requests of one token, and during long answers of one event per token.

    Args:
        seconds: Seconds of each sampled load.
        streams: Concurrent requests.
        answer: Tokens of a long answer.

    Returns:
        A table for each protocol and kind of load; ``sampler`` says how to read them.
    """
    tables = []
    with TemporaryDirectory() as folder, LoadProcesses(CLIENTS) as clients:
        table = Path(folder, "table")
        launcher = ["overfill.lab.bench.router.sampler", str(table)]
        windows = Windows(clients, seconds)

        def profile(server: Server, tokens: int, what: str) -> None:
            def sample() -> None:
                os.kill(server.pid, signal.SIGUSR1)
                time.sleep(seconds)
                os.kill(server.pid, signal.SIGUSR2)
                while not table.exists():  # the router writes it as soon as its handler runs
                    time.sleep(0.01)

            window = windows.measure(server, tokens, streams, during=sample)
            cpu = window.cpu_us(window.counts.ended if tokens == 1 else window.counts.tokens)
            events = f"{window.tokens_per_event:.2f} tokens per event"
            tables.append(f"{server.protocol}, {streams} streams: {cpu:.0f} us of CPU per {what}, {events}\n")
            tables.append(table.read_text() + "\n")
            table.unlink()

        saturation = []
        with paced_stack(pair, SendingPace(), streams, launcher) as servers:
            for server in servers:
                profile(server, 1, "request of one token")
                window = windows.measure(server, answer, streams)
                saturation.append(window.counts.events / window.cpu)
        pace = SendingPace(per_sequence=WORKERS / min(saturation), workers=WORKERS)
        with paced_stack(pair, pace, streams, launcher) as servers:
            for server in servers:
                profile(server, answer, "token")
    return "".join(tables)

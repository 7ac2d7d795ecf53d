"""Parts of a load: what a server spent and what the clients received, from one moment to another."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import psutil

from overfill.client import Client
from overfill.errors import Unavailable
from overfill.lab.cpu_clock import cpu_seconds
from overfill.lab.bench.router.bare_server import SendingPace
from overfill.lab.bench.router.load import TOKEN_TEXT, Api, Load, LoadProcesses, Protocol, Received
from overfill.lab.bench.router.recording import make_request
from overfill.stack.describe import describe
from overfill.stack.placed import place
from overfill.stack.process_runner import running

CLIENTS = 2
"""Client processes."""

WORKERS = 2 if (os.cpu_count() or 1) < 8 else 4
"""Mock workers of each stage."""

_START_SECONDS = 60.0
_SETTLE_SECONDS = 0.4
"""Maximum time between the start of a load and its window, and after its end."""

_ANSWER = 1 << 20
"""Tokens of a mock answer, more than any request asks for."""

_SPARE = 64
"""Sequences that a worker takes beyond those of a load, because ended ones leave a little later."""

_WARM_STREAMS = 8
"""Streams that allocate what a server allocates once, before the memory of open streams is measured."""


@dataclass(frozen=True, slots=True)
class Server:
    """A server under load: the router, or a peer.

    Attributes:
        pid: Its process.
        others: Processes that must not be the bottleneck, such as mock workers.
        api: API of the requests over HTTP.
    """

    protocol: Protocol
    address: str
    pid: int
    model: str
    others: tuple[int, ...] = ()
    api: Api = "chat"

    def load(self, tokens: int, streams: int = 0, rate: float | None = None) -> Load:
        """A load of requests for ``tokens`` tokens."""
        request = make_request(self.protocol, self.model, tokens, self.api)
        return Load(self.protocol, self.address, (request,), tokens, streams, rate, self.api)


@dataclass(frozen=True, slots=True)
class Window:
    """A part of a load.

    Attributes:
        cpu: Seconds of CPU time of the server.
        counts: What the clients received.
        busiest: Largest share of a core that a client or mock worker used.
        workers: Seconds of CPU time of all mock workers.
    """

    seconds: float
    cpu: float
    counts: Received
    busiest: float
    workers: float

    @property
    def tokens_per_event(self) -> float:
        return self.counts.tokens / max(1, self.counts.events)

    def cpu_us(self, count: int) -> float:
        """Microseconds of the server's CPU for each of ``count`` requests or tokens."""
        return 1e6 * self.cpu / max(1, count)

    def per_core(self, count: int) -> float:
        """``count`` per second of the server's CPU; NaN if the server got none, as on a busy machine."""
        return count / self.cpu if self.cpu else float("nan")


class Windows:
    """Measures windows with the given client processes, and counts failed requests.

    Args:
        seconds: Duration of a window.
    """

    def __init__(self, clients: LoadProcesses, seconds: float) -> None:
        self._clients = clients
        self._seconds = seconds
        self._settle = min(seconds, _SETTLE_SECONDS)
        self.failed = 0

    def measure(self, server: Server, tokens: int, streams: int) -> Window:
        """Keeps ``streams`` requests of ``tokens`` tokens running, and measures once all have their first token."""
        with self._running(server.load(tokens, streams)) as counts:
            wait_for_first_tokens(counts, streams)
            time.sleep(self._settle)
            before, workers, cpu, start = counts(), _cpu_of(server.others), cpu_seconds(server.pid), time.perf_counter()
            time.sleep(self._seconds)
            passed = time.perf_counter() - start
            cpu = cpu_seconds(server.pid) - cpu
            after, workers_after = counts(), _cpu_of(server.others)
        used = [b - a for a, b in zip(workers + before.cpu, workers_after + after.cpu, strict=True)]
        return Window(passed, cpu, _difference(after, before), max(used) / passed, sum(used[: len(workers)]))

    def ttft(self, server: Server, rate: float) -> list[float]:
        """Sends requests of one token at fixed times. Returns the seconds to the first token of each."""
        with self._running(server.load(1, rate=rate)) as counts:
            time.sleep(self._settle)
            counts()
            time.sleep(2 * self._seconds)
            return counts().ttft

    def ttft_at_once(self, server: Server, streams: int) -> list[float]:
        """Starts ``streams`` requests of two tokens at once. Returns the seconds to the first token of each."""
        with self._running(server.load(2, streams)) as counts:
            return wait_for_first_tokens(counts, streams)

    def memory(self, server: Server, streams: int) -> float:
        """KiB per open stream that has its first token and waits for the next."""
        process, load = psutil.Process(server.pid), server.load(2, streams)
        with self._running(replace(load, streams=_WARM_STREAMS)) as counts:
            wait_for_first_tokens(counts, _WARM_STREAMS)
        time.sleep(2 * self._settle)
        before = process.memory_info().rss
        with self._running(load) as counts:
            wait_for_first_tokens(counts, streams)
            return (process.memory_info().rss - before) / streams / 1024

    @contextmanager
    def _running(self, load: Load) -> Iterator[Callable[[], Received]]:
        with self._clients.running(load) as counts:
            yield counts
            self.failed += counts().failed
        time.sleep(self._settle)  # the server notices that the clients have gone


@contextmanager
def paced_stack(pair: Path, pace: SendingPace, sequences: int) -> Iterator[tuple[Server, Server]]:
    """Starts a router whose mock workers keep ``pace`` and take ``sequences`` requests each."""
    times = {
        "step": pace.step,
        "per_sequence": pace.per_sequence,
        "answer": TOKEN_TEXT.decode(),
        "answer_tokens": _ANSWER,
    }
    settings = {
        "engine": "mock",
        "engine_args": json.dumps(times),
        "max_num_seqs": sequences + _SPARE,
        "log_level": "warning",
        "grace_period": 2,
    }
    placed = place(describe(pair, prefill=WORKERS, decode=WORKERS, http=0, threads=1, settings=settings))
    with running(placed, lambda name, line: print(line, file=sys.stderr)) as stack:
        grpc = stack.addresses[0]
        http = f"127.0.0.1:{stack.spec.router.http_ports[0]}"
        with Client(grpc) as client:
            model, pid = client.models()[0].name, client.status().process.pid
        workers = tuple(stack.worker(worker.id).pid for worker in stack.placed.workers)
        yield Server("http", http, pid, model, workers), Server("grpc", grpc, pid, model, workers)


def _cpu_of(pids: Sequence[int]) -> list[float]:
    return [cpu_seconds(pid) for pid in pids]


def _difference(after: Received, before: Received) -> Received:
    return Received(
        begun=after.begun - before.begun,
        ended=after.ended - before.ended,
        failed=after.failed - before.failed,
        events=after.events - before.events,
        tokens=after.tokens - before.tokens,
        ttft=after.ttft,
        gaps=after.gaps,
    )


def wait_for_first_tokens(counts: Callable[[], Received], streams: int) -> list[float]:
    """Returns the seconds to the first token of each request that has begun, once ``streams`` have."""
    deadline, ttft = time.monotonic() + _START_SECONDS, list[float]()
    while True:
        found = counts()
        ttft += found.ttft
        if found.begun >= streams:
            return ttft
        if time.monotonic() > deadline:
            raise Unavailable(f"only {found.begun} of {streams} streams began in {_START_SECONDS:g} s")
        time.sleep(0.05)

"""Measures what routers cost: ours, those of other projects, and a bare server (``overfill bench router``).

Each runs in turn on this machine, with all its cores, and gets the same requests from the same client. CPU time is that
of a router's processes, or of its workers', all threads together. The kernel's clock of each process is read before and
after a part of the load.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import psutil

from overfill.lab.bench.router.load import HttpLoad, Received, running
from overfill.lab.cpu_clock import cpu_seconds, family
from overfill.lab.measurement import Measurement
from overfill.lab.peers.process import PeerFailed
from overfill.lab.peers.routers import STARTS, RunningRouter, StartRouter, bare
from overfill.lab.stacks import Log, served
from overfill.pair.store import MOCK, resolve_pair
from overfill.process.open_files import allow_connections
from overfill.telemetry.progress import Report, silent

STREAMS = (1, 32, 256)
"""Concurrent requests of the measured loads."""
OPEN_STREAMS = 1000
"""Open streams whose memory is measured."""
AT_ONCE = 64
"""Requests that start at the same time."""
LOW_RATE = 50.0
"""Requests per second of the low load."""

_FAILED, _CLIENT = "failed_requests", "client"
BOUNDS = {"request_cpu_32": 650.0, "request_cpu_256": 650.0, "token_cpu_256": 25.0, "ttft_64_at_once_max": 50.0}
BOUNDS |= {"memory_per_stream": 12.0, _FAILED: 0}
"""Upper limits of our router's figures."""

_STEP = 0.05
"""Seconds between two tokens of a stream, so that the most streams get 5,120 tokens/s."""
_SLOW_STEP = 5.0
"""The same while the memory of open streams is measured."""
_ANSWER, _LONGEST_ANSWER = 1000, 1 << 20
_BURSTS = 5
_WARM_STREAMS = 8
"""Streams that allocate what a router allocates once, before the memory of open streams is measured."""
_WORKERS = 2 if (os.cpu_count() or 1) < 8 else 4
"""Mock workers of each stage."""
_SPARE = 64
"""Sequences that a worker takes beyond those of a load, because ended ones leave a little later."""
_DELAYED_ACK = 0.005
"""Seconds by which quick acknowledgements must shorten the mean first token, to be used for a router. Linux delays an
acknowledgement by up to 40 ms, and a router without TCP_NODELAY waits for it on a connection that is used again."""
_START_SECONDS, _SETTLE_SECONDS = 60.0, 0.4


@dataclass(slots=True)
class RouterFigures:
    """What one router was measured to cost.

    Attributes:
        about: What ran, in words.
        values: Name of a figure -> value. A figure of N streams has a name that ends in ``_N``.
    """

    about: str
    values: dict[str, float] = field(default_factory=dict)


def measure_cost(
    peers: Sequence[str],
    seconds: float,
    log: Log,
    streams: Sequence[int] = STREAMS,
    open_streams: int = OPEN_STREAMS,
    report: Report = silent,
) -> list[Measurement]:
    """Measures each of ``peers``, then the bare server and our router; each takes about 12 times ``seconds``.

    Args:
        peers: names in ``routers.STARTS``.
        seconds: Duration of each part; the times to first token take two.

    Raises:
        PeerFailed, StartFailed: A router did not start.
    """
    allow_connections(2 * max(open_streams, *streams))  # a proxy has two for each stream
    # Peers come first: one that cannot start here ends the run before minutes are spent on ours.
    starts: dict[str, StartRouter] = {peer: STARTS[peer] for peer in peers}
    starts |= {"bare": bare, "ours": partial(our_router, log=log)}
    found = []
    for done, (name, start) in enumerate(starts.items()):
        report(f"Measuring {name}", done, len(starts))
        found.append(measure_router(start, seconds, streams, open_streams))
    report("Measuring routers", len(starts), len(starts))
    *others, lowest, own = found
    return rows(own, lowest, *others)


@contextmanager
def our_router(step: float, sequences: int, log: Log) -> Iterator[RunningRouter]:
    """Starts our router with mock workers."""
    times = {"step": step, "answer": "~", "answer_tokens": _LONGEST_ANSWER}
    settings = {"engine": "mock", "engine_args": json.dumps(times), "max_num_seqs": sequences}
    shape = {"prefill": _WORKERS, "decode": _WORKERS, "threads": 1}
    with served(resolve_pair(MOCK), settings=settings, log=log, **shape) as stack:
        address = stack.url.removeprefix("http://").removesuffix("/v1")
        workers = tuple(pid for name, pid in stack.processes.items() if name != "router")
        yield RunningRouter(address, stack.model, "ours", family(stack.processes["router"]), workers)


def measure_router(start: StartRouter, seconds: float, streams: Sequence[int], open_streams: int) -> RouterFigures:
    """Starts a router twice: with tokens at the usual pace, and with slow ones, to measure memory."""
    with start(_STEP, max(AT_ONCE, *streams) + _SPARE) as server:
        turn = _Turn(server, seconds)
        turn.at_rest()
        turn.first_tokens()
        for count in streams:
            turn.requests(count)
        for count in streams:
            turn.tokens(count)
    with start(_SLOW_STEP, open_streams + _SPARE) as server:
        turn.server = server
        turn.memory(open_streams)
    return turn.figures


class _Turn:
    """Measures a router."""

    def __init__(self, server: RunningRouter, seconds: float) -> None:
        self.server = server
        self.figures = RouterFigures(server.about, {_FAILED: 0.0, _CLIENT: 0.0})
        self._values = self.figures.values
        self._seconds = seconds
        self._settle = min(seconds, _SETTLE_SECONDS)
        self._quick = False

    def at_rest(self) -> None:
        time.sleep(self._settle)
        self._values["memory_at_rest"] = _memory(self.server) / 2**20
        cpu = cpu_seconds(*self.server.router)
        time.sleep(self._seconds)
        self._values["cpu_at_rest"] = 1e3 * (cpu_seconds(*self.server.router) - cpu) / self._seconds

    def first_tokens(self) -> None:
        """Measures the time to first token, without and with quick acknowledgements, and keeps what is better."""
        plain, quick = (self._first_tokens(quick) for quick in (False, True))
        self._quick = statistics.mean(quick) < statistics.mean(plain) - _DELAYED_ACK
        if self._quick:
            self.figures.about += ", quick ACKs"
        for percent in (50, 99):
            self._values[f"ttft_p{percent}"] = 1e3 * float(np.percentile(quick if self._quick else plain, percent))
        largest = []
        for _ in range(_BURSTS):
            with self._running(HttpLoad(self.server, 1, AT_ONCE, once=True)) as counts:
                largest.append(max(_wait_for_first_tokens(counts, AT_ONCE)))
        self._values[f"ttft_{AT_ONCE}_at_once_max"] = 1e3 * statistics.median(largest)

    def _first_tokens(self, quick: bool) -> list[float]:
        self._quick = quick
        with self._running(HttpLoad(self.server, 2, rate=LOW_RATE)) as counts:
            begun = len(_wait_for_first_tokens(counts, 5))
            time.sleep(2 * self._seconds)
            return _wait_for_first_tokens(counts, begun + 1)[begun:]

    def requests(self, streams: int) -> None:
        """Measures requests of one token, as fast as the router answers them."""
        self._window(f"request_cpu_{streams}", 1, streams)

    def tokens(self, streams: int) -> None:
        """Measures long answers at a fixed pace."""
        events, tokens = self._window(f"token_cpu_{streams}", _ANSWER, streams)
        self._values[f"tokens_per_event_{streams}"] = tokens / max(1, events)
        self._values[f"rate_{streams}"] = tokens / self._seconds  # the same for all that keep the pace

    def memory(self, streams: int) -> None:
        """Measures the memory of streams that have their first token and wait for the next."""
        with self._running(HttpLoad(self.server, _ANSWER, _WARM_STREAMS)) as counts:
            _wait_for_first_tokens(counts, _WARM_STREAMS)
        before = _memory(self.server)
        with self._running(HttpLoad(self.server, _ANSWER, streams)) as counts:
            _wait_for_first_tokens(counts, streams)
            self._values["memory_per_stream"] = (_memory(self.server) - before) / streams / 1024

    def _window(self, name: str, tokens: int, streams: int) -> tuple[int, int]:
        """Keeps requests of ``tokens`` tokens running. Returns the events and tokens that arrived within a window.

        Adds the CPU time, in microseconds per token, or per request of one token. It is NaN if a busy machine let none
        through.
        """
        with self._running(HttpLoad(self.server, tokens, streams)) as counts:
            _wait_for_first_tokens(counts, streams)
            time.sleep(self._settle)
            before, client, start = counts(), time.process_time(), time.perf_counter()
            router, workers = cpu_seconds(*self.server.router), cpu_seconds(*self.server.workers)
            time.sleep(self._seconds)
            router, workers = cpu_seconds(*self.server.router) - router, cpu_seconds(*self.server.workers) - workers
            used = (time.process_time() - client) / (time.perf_counter() - start)
            after = counts()
        self._values[_CLIENT] = max(self._values[_CLIENT], used)
        ended, events, received = (getattr(after, of) - getattr(before, of) for of in ("ended", "events", "tokens"))
        count = (ended if tokens == 1 else received) or math.nan
        self._values[name] = 1e6 * router / count
        if self.server.workers:
            self._values[f"workers_{name}"] = 1e6 * workers / count
        return events, received

    @contextmanager
    def _running(self, load: HttpLoad) -> Iterator[Callable[[], Received]]:
        with running(replace(load, quick_ack=self._quick)) as counts:
            yield counts
            self._values[_FAILED] += counts().failed
        time.sleep(self._settle)  # the router notices that the client has gone


def rows(ours: RouterFigures, bare: RouterFigures, *peers: RouterFigures) -> list[Measurement]:
    """A row per figure and peer: first those of other projects' routers, with where we lose most on top.

    Less is better in each. What only tells how the measurement went comes last.
    """
    found = [one for peer in peers for one in _beside(ours, peer)]
    found.sort(key=lambda one: -np.nan_to_num(one.peer_ratio or 0))
    found += [replace(one, bound=BOUNDS.get(one.name)) for one in _beside(ours, bare)]
    # A peer that fails requests does less work, so its figures prove nothing.
    failed = ((peer.about, peer.values[_FAILED]) for peer in peers)
    found += [Measurement(f"{_FAILED} of {about}", count, "requests", 0) for about, count in failed if count]
    return sorted(found, key=lambda one: one.unit in ("tokens", "tokens/s", "cores", "requests"))


def _beside(ours: RouterFigures, peer: RouterFigures) -> list[Measurement]:
    return [
        Measurement(name, value, _unit(name), peer=peer.about, peer_value=peer.values[name])
        for name, value in ours.values.items()
        if name in peer.values
    ]


def _unit(name: str) -> str:
    units = {"ttft": "ms", "memory_at": "MiB", "memory_per": "KiB", "cpu_at": "ms/s", "tokens": "tokens"}
    units |= {"rate": "tokens/s", _FAILED: "requests", _CLIENT: "cores"}
    return next((unit for start, unit in units.items() if name.startswith(start)), "us")


def _memory(server: RunningRouter) -> int:
    return sum(psutil.Process(pid).memory_info().rss for pid in server.router)


def _wait_for_first_tokens(counts: Callable[[], Received], requests: int) -> list[float]:
    """Returns the seconds to the first token of each request that has got it, once ``requests`` have."""
    deadline = time.monotonic() + _START_SECONDS
    while len((found := counts()).ttft) < requests:
        if time.monotonic() > deadline:
            raise PeerFailed(
                f"only {len(found.ttft)} of {requests} requests got a token within {_START_SECONDS:g} s; "
                f"{found.failed} failed"
            )
        time.sleep(0.02)
    return found.ttft

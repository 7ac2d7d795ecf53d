"""Measures what the router costs, beside bare servers that send the same bytes (``overfill bench router``).

A real router, mock workers, bare servers and client processes run on this machine. CPU time is that of the server's
process alone, all its threads together. The kernel's clock of that process is read before and after a part of the load.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from overfill.lab.measurement import Measurement
from overfill.lab.bench.router.bare_server import SendingPace, bare_server
from overfill.lab.bench.router.load import LoadProcesses, Protocol
from overfill.lab.bench.router.recording import record
from overfill.lab.bench.router.windows import CLIENTS, WORKERS, Server, Windows, paced_stack

PEERS: dict[Protocol, str] = {"http": "bare uvicorn", "grpc": "bare grpc.aio"}
STREAMS = (1, 32, 256)
"""Concurrent requests of the measured loads."""

ANSWER = 1000
"""Tokens of a long answer."""

IDLE_STREAMS = 5000
"""Open streams whose memory is measured."""

AT_ONCE = 64
"""Streams that start at the same time."""

_BURSTS = 5

_REQUEST_CPU = 650.0
"""Bound of the CPU of a request of one token in microseconds, when several run."""

_WORKERS_CPU = 1000.0
"""Bound of the CPU of both stages' mock workers per request of two tokens in microseconds, with its KV."""

_WORKERS_STREAMS = 32

_TOKEN_CPU: dict[Protocol, float | None] = {"http": 25.0, "grpc": None}
"""Bound of the CPU per token in microseconds, at the most streams and one event per token."""

_STREAM_MEMORY: dict[Protocol, float] = {"http": 12.0, "grpc": 60.0}
"""Bound of the memory of an open stream in KiB."""

_TOKEN_CPU_RATIO: dict[Protocol, float] = {"http": 2.0, "grpc": 1.5}
"""Bound of the router's CPU per token over the peer's, at the most streams and one event per token."""

_HOUR = 3600.0


class _Figures(dict[str, Measurement]):
    """Name -> figure of one server. The bounds are for the router's."""

    def add(
        self, name: str, value: float | np.floating, unit: str, bound: float | None = None, at_least: bool = False
    ) -> None:
        self[name] = Measurement(name, float(value), unit, bound, at_least)


def measure_cost(
    pair: Path, seconds: float, streams: Sequence[int] = STREAMS, idle_streams: int = IDLE_STREAMS
) -> list[Measurement]:
    """Measures CPU, saturation, latency and memory in about 70 times ``seconds``.

    Stacks run after each other, each followed by its peers. The workers of the first have no delay. Those of the second
    send as many tokens per second as a core of the router wrote events at saturation, so that it merges no tokens.
    Then come two stacks for each protocol. The workers of one send a quarter more than a core of the router can pass on
    in events of one token, so that merging sets in. Those of the other send nothing after the first token.

    Args:
        seconds: Duration of each part; latencies take two.
        streams: Numbers of concurrent requests; the last is the largest.
        idle_streams: Number of open streams whose memory is measured.
    """
    router = {protocol: _Figures() for protocol in PEERS}
    bare = {protocol: _Figures() for protocol in PEERS}
    with LoadProcesses(CLIENTS) as clients:
        windows = Windows(clients, seconds)

        def beside_peers(
            protocols: Collection[Protocol],
            pace: SendingPace,
            sequences: int,
            measure: Callable[[Server, _Figures, _Figures], None],
        ) -> None:
            with paced_stack(pair, pace, sequences) as both:
                servers = [server for server in both if server.protocol in protocols]
                recordings = [record(server.protocol, server.address, server.model) for server in servers]
                for server in servers:
                    measure(server, router[server.protocol], router[server.protocol])
            for of, recording in zip(servers, recordings, strict=True):
                with bare_server(of.protocol, recording, pace) as (address, pid):
                    peer = Server(of.protocol, address, pid, of.model)
                    measure(peer, bare[of.protocol], router[of.protocol])

        beside_peers(PEERS, SendingPace(), streams[-1], partial(_measure_saturation, windows, streams))
        # At saturation tokens merge, and an event with many tokens costs more than an event with one.
        rate = min(f["tokens_per_core"].value / f["saturated_tokens_per_event"].value for f in router.values())
        pace = SendingPace(per_sequence=WORKERS / rate, workers=WORKERS)
        beside_peers(PEERS, pace, streams[-1], partial(_measure_tokens, windows, streams))
        for protocol in PEERS:
            rate = 1.25e6 / router[protocol][f"token_cpu_{streams[-1]}"].value
            pace = SendingPace(per_sequence=WORKERS / rate, workers=WORKERS)
            beside_peers([protocol], pace, streams[-1], partial(_measure_merging, windows, streams[-1]))
        for protocol in PEERS:  # a stack each, because memory that the first has freed would serve the second
            idle = partial(_measure_open, windows, idle_streams)
            beside_peers([protocol], SendingPace(step=_HOUR), idle_streams, idle)
    found = [one for protocol in PEERS for one in _measurements(protocol, router[protocol], bare[protocol], streams)]
    return [*found, Measurement("failed_requests", windows.failed, "requests", 0)]


def _measure_saturation(
    windows: Windows, streams: Sequence[int], server: Server, into: _Figures, router: _Figures
) -> None:
    """Measures requests of one token, and long answers that arrive as fast as the server sends them."""
    for count in streams:
        window = windows.measure(server, 1, count)
        bound = _REQUEST_CPU if count > 1 else None
        into.add(f"request_cpu_{count}", window.cpu_us(window.counts.ended), "us", bound)
        if count == 1:
            into.add("ttft_alone_p50", 1e3 * np.percentile(window.counts.ttft, 50), "ms", 3.0)
            into.add("ttft_alone_p95", 1e3 * np.percentile(window.counts.ttft, 95), "ms")
    into.add("requests_per_second", window.counts.ended / window.seconds, "1/s")
    into.add("requests_per_core", window.per_core(window.counts.ended), "1/s", 1000, at_least=True)
    into.add("requests_cores", window.cpu / window.seconds, "cores")
    into.add("requests_busiest_other", window.busiest, "cores")
    ttft = windows.ttft(server, router["requests_per_second"].value / 2) or [float("nan")]
    for percent in (50, 99):
        into.add(f"ttft_p{percent}", 1e3 * np.percentile(ttft, percent), "ms")
    window = windows.measure(server, ANSWER, streams[-1])
    into.add("saturated_token_cpu", window.cpu_us(window.counts.tokens), "us")
    into.add("saturated_tokens_per_event", window.tokens_per_event, "tokens")
    into.add("tokens_per_second", window.counts.tokens / window.seconds, "1/s")
    into.add("tokens_per_core", window.per_core(window.counts.tokens), "1/s", 30_000, at_least=True)
    into.add("tokens_cores", window.cpu / window.seconds, "cores")
    into.add("tokens_busiest_other", window.busiest, "cores")
    if server.others:
        window = windows.measure(server, 2, min(_WORKERS_STREAMS, streams[-1]))
        into.add("workers_request_cpu", 1e6 * window.workers / max(1, window.counts.ended), "us", _WORKERS_CPU)


def _measure_tokens(windows: Windows, streams: Sequence[int], server: Server, into: _Figures, router: _Figures) -> None:
    """Measures long answers at a fixed pace."""
    for count in streams:
        window = windows.measure(server, ANSWER, count)
        # Answers that end in the window are followed by requests, whose cost is known.
        requests = window.counts.begun * into[f"request_cpu_{count}"].value
        per_token = window.cpu_us(window.counts.tokens) - requests / max(1, window.counts.tokens)
        into.add(f"token_cpu_{count}", per_token, "us", _TOKEN_CPU[server.protocol] if count > 1 else None)
        into.add(f"tokens_per_event_{count}", window.tokens_per_event, "tokens")


def _measure_merging(windows: Windows, streams: int, server: Server, into: _Figures, router: _Figures) -> None:
    """Measures long answers at a pace at which the router begins to merge tokens."""
    window = windows.measure(server, ANSWER, streams)
    into.add("merging_token_cpu", window.cpu_us(window.counts.tokens), "us", 20)
    into.add("merging_tokens_per_event", window.tokens_per_event, "tokens")
    gaps = window.counts.gaps or [float("nan")]
    for percent in (50, 99):
        into.add(f"merging_itl_p{percent}", 1e3 * np.percentile(gaps, percent), "ms")


def _measure_open(windows: Windows, streams: int, server: Server, into: _Figures, router: _Figures) -> None:
    """Measures streams that send nothing after the first token: their memory, and many that start at once."""
    into.add("memory_per_stream", windows.memory(server, streams), "KiB", _STREAM_MEMORY[server.protocol])
    bursts = [windows.ttft_at_once(server, AT_ONCE) for _ in range(_BURSTS)]
    into.add(f"ttft_{AT_ONCE}_at_once_p50", 1e3 * np.median([np.median(ttft) for ttft in bursts]), "ms")
    into.add(f"ttft_{AT_ONCE}_at_once_max", 1e3 * np.median([max(ttft) for ttft in bursts]), "ms", 50.0)


def _measurements(protocol: Protocol, router: _Figures, bare: _Figures, streams: Sequence[int]) -> list[Measurement]:
    found = [replace(one, name=f"{protocol}_{name}") for name, one in router.items() if name not in bare]
    for name, one in bare.items():
        found.append(replace(router[name], name=f"{protocol}_{name}", peer=PEERS[protocol], peer_value=one.value))
    name = f"token_cpu_{streams[-1]}"
    ratio = router[name].value / bare[name].value
    found.append(Measurement(f"{protocol}_token_cpu_ratio_{streams[-1]}", ratio, "x", _TOKEN_CPU_RATIO[protocol]))
    for name, bound in (("ttft_p50", 1.0), ("ttft_p99", 4.0), ("merging_itl_p99", 10.0)):
        added = router[name].value - bare[name].value
        found.append(Measurement(f"{protocol}_added_{name}", added, "ms", bound))
    return found

"""What HTTP costs beside gRPC (``overfill bench http``). Real router, mock workers, no model.

One client asks over both protocols in turn, so that both see the same machine. Time to first token is the client's,
from the call to the first token's text; saturation is many streams at once on one router.
"""

from __future__ import annotations

import http.client
import json
import os
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from overfill.cli.processes import Child, stop
from overfill.cli.stack import child_environment, free_ports
from overfill.client import Client, Message, SamplingParams
from overfill.errors import OverfillError
from overfill.lab.bench.figure import Figure

PROMPT = "Explain in a few sentences what a cache is good for, and when it does harm."
BOUND_MS = 2.0
"""Most that HTTP may add to the median time to first token."""

Ask = Callable[[int], tuple[float, int]]
"""Asks for so many tokens; seconds to the first one, and how many came."""


@contextmanager
def mock_processes(
    pair: Path, max_num_seqs: int, *, router: Sequence[str] = (), decode: Sequence[str] = ()
) -> Iterator[tuple[str, int]]:
    """A router and two mock workers as processes, with more flags; the gRPC address and the HTTP port."""
    grpc_port, http_port = free_ports("127.0.0.1", 2)
    address = f"127.0.0.1:{grpc_port}"
    commands = {
        "router": ["services.router.main", f"--port={grpc_port}", f"--http={http_port}", *router],
        "prefill": ["services.mock", "prefill", f"--routers={address}"],
        "decode": ["services.mock", "decode", f"--routers={address}", *decode],
    }
    children = []
    try:
        for name, (module, *arguments) in commands.items():
            workers = [] if name == "router" else [f"--max-num-seqs={max_num_seqs}", "--mock-kv-blocks=100000"]
            command = [sys.executable, "-m", module, *arguments, f"--pair={pair}", *workers, "--log-level=warning"]
            children.append(Child(name, command, child_environment(os.environ, 1), lambda name, line: print(line)))
        with Client(address) as client:
            until_it_answers(client)
        yield address, http_port
    finally:
        stop(children, grace=2)


def over_grpc(client: Client) -> Ask:
    """Asks with the SDK."""

    def ask(tokens: int) -> tuple[float, int]:
        sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
        start = time.perf_counter()
        with client.stream([Message("user", PROMPT)], sampling=sampling) as stream:
            count = len(next(stream).token_ids)
            first = time.perf_counter() - start
            count += sum(len(delta.token_ids) for delta in stream)
        return first, count

    return ask


def over_http(port: int) -> Ask:
    """Asks with Python's own HTTP client, one kept connection per thread."""
    local = threading.local()

    def ask(tokens: int) -> tuple[float, int]:
        if not hasattr(local, "connection"):
            local.connection = http.client.HTTPConnection("127.0.0.1", port)
            local.model = _model(local.connection)
        body = {
            "model": local.model,
            "messages": [{"role": "user", "content": PROMPT}],
            "temperature": 0,
            "max_tokens": tokens,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        start = time.perf_counter()
        local.connection.request("POST", "/v1/chat/completions", json.dumps(body), {"content-type": "application/json"})
        response = local.connection.getresponse()
        first, count = 0.0, 0
        for line in response:
            if not first and b'"content":"' in line and b'"content":""' not in line:
                first = time.perf_counter() - start
            if b'"usage":{' in line:
                count = json.loads(line.removeprefix(b"data: "))["usage"]["completion_tokens"]
        return first, count

    return ask


def ttft(asks: dict[str, Ask], rounds: int) -> dict[str, list[float]]:
    """Milliseconds to the first token, both protocols in turn."""
    for ask in asks.values():
        for _ in range(50):
            ask(2)
    times: dict[str, list[float]] = {name: [] for name in asks}
    for _ in range(rounds):
        for name, ask in asks.items():
            times[name].append(1e3 * ask(2)[0])
    return times


def saturation(ask: Ask, streams: int, tokens: int, rounds: int) -> float:
    """Tokens per second that clients receive."""
    start = time.perf_counter()
    with ThreadPoolExecutor(streams) as pool:
        total = sum(count for _, count in pool.map(ask, [tokens] * (streams * rounds)))
    return total / (time.perf_counter() - start)


def compare(pair: Path, rounds: int, streams: int, tokens: int) -> list[Figure]:
    """Measures both protocols on one router: ``rounds`` requests over each in turn, then ``streams`` answers at once,
    over one after the other."""
    with mock_processes(pair, 2 * streams) as (address, port), Client(address) as client:
        asks = {"gRPC": over_grpc(client), "HTTP": over_http(port)}
        times = ttft(asks, rounds)
        rates = {name: saturation(ask, streams, tokens, 3) for name, ask in asks.items()}

    def beside(name: str, unit: str, values: dict[str, float]) -> Figure:
        return Figure(name, values["HTTP"], unit, peer="gRPC", peer_value=values["gRPC"])

    p50, p99 = ({name: _p(values, share) for name, values in times.items()} for share in (50, 99))
    return [
        beside("ttft_p50", "ms", p50),
        beside("ttft_p99", "ms", p99),
        beside("tokens_at_saturation", "tokens/s", rates),
        Figure("added_ttft_p50", p50["HTTP"] - p50["gRPC"], "ms", BOUND_MS),
    ]


def _p(values: Sequence[float], percent: int) -> float:
    return statistics.quantiles(values, n=100)[percent - 1]


def _model(connection: http.client.HTTPConnection) -> str:
    connection.request("GET", "/v1/models")
    return str(json.loads(connection.getresponse().read())["data"][0]["id"])


def until_it_answers(client: Client) -> None:
    deadline = time.monotonic() + 60
    while True:
        try:
            client.generate("x", sampling=SamplingParams(max_tokens=1), timeout=5)
            return
        except OverfillError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)

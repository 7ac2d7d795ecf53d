"""Measures the cost of the router, and its behaviour under overload (``overfill bench router``).

A real router and mock workers of known timing run as processes of this machine; the client shares its cores. CPU time
is that of the router's process, read before and after the load.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import psutil

from overfill.cli.processes import stop
from overfill.cli.stack import free_ports
from overfill.client import AsyncClient
from overfill.errors import OverfillError, Overloaded
from overfill.lab.bench.measurement import Measurement
from overfill.lab.bench.router.mock_stack import mock_stack, start_module, wait_until_answering
from overfill.request.params import SamplingParams

PROMPT = tuple(range(10, 74))
STREAMS = 32
"""Concurrent requests of the closed loop."""

LONG_ANSWER = 64
"""Tokens of a long answer; a short one has a single token."""

PEER = "bare gRPC"


@dataclass(slots=True)
class ClientLoad:
    """Counts and latencies that the client saw.

    Attributes:
        ttft: Seconds to the first token of each answered request.
        refused: Seconds until each refusal.
        without_retry: Number of refusals that named no time to retry.
        tokens: Number of received tokens.
        failed: Number of requests that failed in another way.
    """

    ttft: list[float] = field(default_factory=list)
    refused: list[float] = field(default_factory=list)
    without_retry: int = 0
    tokens: int = 0
    failed: int = 0


@dataclass(frozen=True, slots=True)
class ServerCost:
    """CPU time of a server process at saturation, and latency at half of that rate.

    Attributes:
        request_us, token_us: CPU microseconds per request and per streamed token.
        short_rate, token_rate: Requests per second with short answers; tokens per second with long ones.
        ttft: Seconds to the first token at a fixed rate.
    """

    request_us: float
    token_us: float
    short_rate: float
    token_rate: float
    ttft: list[float]


def measure_cost(pair: Path, seconds: float) -> list[Measurement]:
    """Measures CPU and throughput at saturation, and added latency at half of it, in about 6 x ``seconds``.

    The peer is ``bare_server``, which answers the same RPC at once. The same client sends it the same requests, at the
    same rate where latency is measured. The difference is the cost of the router, its hops and the mock workers.
    """
    with mock_stack(pair, STREAMS * 2) as (address, pid):
        router = _server_cost(address, psutil.Process(pid), seconds, None)
    with _bare_server() as (address, pid):
        bare = _server_cost(address, psutil.Process(pid), seconds, router.short_rate / 2)

    def beside(name: str, value: float, peer_value: float, unit: str) -> Measurement:
        return Measurement(name, value, unit, peer=PEER, peer_value=peer_value)

    measurements = [
        beside("cpu_per_request", router.request_us, bare.request_us, "us"),
        beside("cpu_per_token", router.token_us, bare.token_us, "us"),
        beside("requests_at_saturation", router.short_rate, bare.short_rate, "1/s"),
        beside("tokens_at_saturation", router.token_rate, bare.token_rate, "1/s"),
    ]
    for percent, bound in ((50, 1.0), (99, 5.0)):
        ours, peer = _percentile_ms(router.ttft, percent), _percentile_ms(bare.ttft, percent)
        measurements.append(Measurement(f"added_ttft_p{percent}", ours - peer, "ms", bound))
        measurements.append(beside(f"ttft_p{percent}", ours, peer, "ms"))
    return measurements


def measure_overload(
    pair: Path, seconds: float, *, slots: int = 4, step: float = 0.05, tokens: int = 8, max_wait: float = 1.0
) -> list[Measurement]:
    """Offers ten times the workers' capacity for ``seconds``.

    The bounds: an admitted request gets its first token within ``max_wait`` plus 100 ms, and any other request is
    refused within 50 ms.

    Args:
        slots: Maximum concurrent sequences of each worker.
        step: Seconds of a decode step.
        tokens: Tokens of an answer.
        max_wait: Seconds that the router lets a request wait.
    """
    capacity = slots / (step * tokens)
    with mock_stack(pair, slots, router=[f"--max-wait={max_wait}"], decode=[f"--mock-step={step}"]) as (address, pid):
        process = psutil.Process(pid)
        asyncio.run(_open_loop(address, capacity * 10, 5.0, tokens))
        before = process.memory_info().rss
        load = asyncio.run(_open_loop(address, capacity * 10, seconds, tokens))
        after = process.memory_info().rss
    return [
        Measurement("capacity", capacity, "1/s"),
        Measurement("offered", capacity * 10, "1/s"),
        Measurement("answered", len(load.ttft) / seconds, "1/s", 0.8 * capacity, at_least=True),
        Measurement("refused", len(load.refused) / seconds, "1/s"),
        Measurement("failed", load.failed, "requests", 0),
        Measurement("refused_without_retry_time", load.without_retry, "requests", 0),
        Measurement("ttft_p50", _percentile_ms(load.ttft, 50), "ms"),
        Measurement("ttft_p99", _percentile_ms(load.ttft, 99), "ms", 1e3 * max_wait + 100),
        Measurement("refusal_p50", _percentile_ms(load.refused, 50), "ms"),
        Measurement("refusal_p99", _percentile_ms(load.refused, 99), "ms", 50),
        Measurement("memory_growth", (after - before) / 2**20, "MiB", 4),
    ]


@contextmanager
def _bare_server() -> Iterator[tuple[str, int]]:
    """Starts ``bare_server``; yields its address and process id."""
    address = f"127.0.0.1:{(port := free_ports('127.0.0.1', 1)[0])}"
    child = start_module("bare", ["overfill.lab.bench.router.bare_server", str(port)])
    try:
        wait_until_answering(address)
        yield address, child.pid
    finally:
        stop([child], grace=2)


def _server_cost(address: str, process: psutil.Process, seconds: float, rate: float | None) -> ServerCost:
    """Saturates a server with short and then with long answers; then sends short requests at ``rate`` per second.

    None as ``rate`` means half of the server's own rate with short answers.
    """
    short_us, short_rate = _saturate(address, process, 1, seconds)
    long_us, long_rate = _saturate(address, process, LONG_ANSWER, seconds)
    load = asyncio.run(_open_loop(address, rate or short_rate / 2, seconds, 1))
    token_us = (long_us - short_us) / (LONG_ANSWER - 1)
    # CPU per request = CPU of an answer of one token, minus CPU per token.
    return ServerCost(short_us - token_us, token_us, short_rate, long_rate * LONG_ANSWER, load.ttft)


def _saturate(address: str, process: psutil.Process, tokens: int, seconds: float) -> tuple[float, float]:
    """Keeps ``STREAMS`` requests running. Returns CPU microseconds per request, and requests per second."""
    asyncio.run(_closed_loop(address, 0.5, tokens))
    before, start = process.cpu_times(), time.perf_counter()
    load = asyncio.run(_closed_loop(address, seconds, tokens))
    passed, after = time.perf_counter() - start, process.cpu_times()
    cpu = after.user + after.system - before.user - before.system
    return cpu / len(load.ttft) * 1e6, len(load.ttft) / passed


async def _closed_loop(address: str, seconds: float, tokens: int) -> ClientLoad:
    """Runs ``STREAMS`` clients that each send the next request when the last one is answered."""
    load, end = ClientLoad(), time.perf_counter() + seconds

    async def stream(client: AsyncClient) -> None:
        while time.perf_counter() < end:
            await _ask(client, tokens, load)

    async with AsyncClient(address) as client:
        await asyncio.gather(*(stream(client) for _ in range(STREAMS)))
    return load


async def _open_loop(address: str, rate: float, seconds: float, tokens: int) -> ClientLoad:
    """Sends requests at fixed times, without waiting for earlier answers."""
    load = ClientLoad()
    async with AsyncClient(address) as client, asyncio.TaskGroup() as group:
        start = time.perf_counter()
        for index in range(int(rate * seconds)):
            await asyncio.sleep(max(0.0, start + index / rate - time.perf_counter()))
            group.create_task(_ask(client, tokens, load))
    return load


async def _ask(client: AsyncClient, tokens: int, load: ClientLoad) -> None:
    sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    start, first = time.perf_counter(), 0.0
    try:
        async with client.stream(PROMPT, sampling=sampling) as stream:
            async for delta in stream:
                first = first or time.perf_counter() - start
                load.tokens += len(delta.token_ids)
        load.ttft.append(first)
    except Overloaded as error:
        load.refused.append(time.perf_counter() - start)
        load.without_retry += error.retry_after is None
    except OverfillError:
        load.failed += 1


def _percentile_ms(seconds: Sequence[float], percent: float) -> float:
    return float(np.percentile(seconds, percent)) * 1e3 if seconds else float("nan")

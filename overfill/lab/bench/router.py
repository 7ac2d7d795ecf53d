"""What the router itself costs: CPU, latency, saturation, and what it does under overload (``overfill bench router``).

Real router, mock workers of known timing, all as processes of this machine; the client shares its cores. CPU is that of
the router's process, read before and after.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import psutil

from overfill.cli.processes import Child, stop
from overfill.cli.stack import child_environment, free_ports
from overfill.client import AsyncClient, Client
from overfill.errors import OverfillError, Overloaded
from overfill.lab.bench.figure import Figure
from overfill.lab.bench.protocols import mock_processes, until_it_answers
from overfill.request.params import SamplingParams

PROMPT = tuple(range(10, 74))
STREAMS = 32
LONG = 64
"""Tokens of an answer, where many are wanted."""


@dataclass(slots=True)
class Load:
    """What a client saw. Seconds.

    Attributes:
        ttft: of each answered request.
        refused: how long each refusal took.
        without_retry: refusals that said no time to try again.
    """

    ttft: list[float] = field(default_factory=list)
    refused: list[float] = field(default_factory=list)
    without_retry: int = 0
    tokens: int = 0
    failed: int = 0

    def percentile_ms(self, values: Sequence[float], share: float) -> float:
        return float(np.percentile(values, share)) * 1e3 if values else float("nan")


def measure_cost(pair: Path, seconds: float) -> list[Figure]:
    """Saturation with short and long answers, then latency at half of it; some four times ``seconds``.

    A request's own CPU is what an answer of one token costs less that token's. The peer is a server that answers the
    same RPC at once (``bare_server``), asked by the same client at the same rate: what the router, the
    hops behind it and the mock workers add is the difference.
    """
    with mock_processes(pair, STREAMS * 2) as (address, _):
        process = psutil.Process(_router_pid(address))
        one_us, one_rate = _saturate(address, process, 1, seconds)
        many_us, many_rate = _saturate(address, process, LONG, seconds)
        half = asyncio.run(_open_loop(address, one_rate / 2, seconds, 1))
    with _bare_server() as address:
        bare = asyncio.run(_open_loop(address, one_rate / 2, seconds, 1))
    token_us = (many_us - one_us) / (LONG - 1)
    figures = [
        Figure("cpu_per_request", one_us - token_us, "us"),
        Figure("cpu_per_token", token_us, "us"),
        Figure("requests_at_saturation", one_rate, "1/s"),
        Figure("tokens_at_saturation", many_rate * LONG, "1/s"),
    ]
    for share, most in ((50, 1.0), (99, 5.0)):
        ours, peer = half.percentile_ms(half.ttft, share), bare.percentile_ms(bare.ttft, share)
        figures.append(Figure(f"added_ttft_p{share}", ours - peer, "ms", most))
        figures.append(Figure(f"ttft_p{share}", ours, "ms", peer="bare gRPC", peer_value=peer))
    return figures


def measure_overload(
    pair: Path, seconds: float, *, slots: int = 4, step: float = 0.05, tokens: int = 8, max_wait: float = 1.0
) -> list[Figure]:
    """Ten times the load that ``slots`` sequences of ``tokens`` steps of ``step`` seconds make, for ``seconds``.

    What is admitted is to have its first token within ``max_wait`` and a tenth, the rest an answer within 50 ms.
    """
    capacity = slots / (step * tokens)
    worker = [f"--mock-step={step}"]
    with mock_processes(pair, slots, router=[f"--max-wait={max_wait}"], decode=worker) as (address, _):
        process = psutil.Process(_router_pid(address))
        asyncio.run(_open_loop(address, capacity * 10, 5.0, tokens))
        before = process.memory_info().rss
        load = asyncio.run(_open_loop(address, capacity * 10, seconds, tokens))
        after = process.memory_info().rss
    return [
        Figure("capacity", capacity, "1/s"),
        Figure("offered", capacity * 10, "1/s"),
        Figure("answered", len(load.ttft) / seconds, "1/s", 0.8 * capacity, at_least=True),
        Figure("refused", len(load.refused) / seconds, "1/s"),
        Figure("failed", load.failed, "requests", 0),
        Figure("refused_without_retry_time", load.without_retry, "requests", 0),
        Figure("ttft_p50", load.percentile_ms(load.ttft, 50), "ms"),
        Figure("ttft_p99", load.percentile_ms(load.ttft, 99), "ms", 1e3 * max_wait + 100),
        Figure("refusal_p50", load.percentile_ms(load.refused, 50), "ms"),
        Figure("refusal_p99", load.percentile_ms(load.refused, 99), "ms", 50),
        Figure("memory_growth", (after - before) / 2**20, "MiB", 4),
    ]


@contextmanager
def _bare_server() -> Iterator[str]:
    address = f"127.0.0.1:{(port := free_ports('127.0.0.1', 1)[0])}"
    command = [sys.executable, "-m", "overfill.lab.bench.bare_server", str(port)]
    child = Child("bare", command, child_environment(os.environ, 1), lambda name, line: print(line))
    try:
        with Client(address) as client:
            until_it_answers(client)
        yield address
    finally:
        stop([child], grace=2)


def _router_pid(address: str) -> int:
    with Client(address) as client:
        pid = client.status().process.pid
    assert pid != os.getpid()
    return pid


def _saturate(address: str, process: psutil.Process, tokens: int, seconds: float) -> tuple[float, float]:
    """CPU microseconds of the router per request, and requests per second."""
    asyncio.run(_closed_loop(address, 0.5, tokens))
    before, start = process.cpu_times(), time.perf_counter()
    load = asyncio.run(_closed_loop(address, seconds, tokens))
    passed, after = time.perf_counter() - start, process.cpu_times()
    cpu = after.user + after.system - before.user - before.system
    return cpu / len(load.ttft) * 1e6, len(load.ttft) / passed


async def _closed_loop(address: str, seconds: float, tokens: int) -> Load:
    load, end = Load(), time.perf_counter() + seconds

    async def stream(client: AsyncClient) -> None:
        while time.perf_counter() < end:
            await _ask(client, tokens, load)

    async with AsyncClient(address) as client:
        await asyncio.gather(*(stream(client) for _ in range(STREAMS)))
    return load


async def _open_loop(address: str, rate: float, seconds: float, tokens: int) -> Load:
    """Requests at fixed times, whatever becomes of them."""
    load = Load()
    async with AsyncClient(address) as client, asyncio.TaskGroup() as group:
        start = time.perf_counter()
        for index in range(int(rate * seconds)):
            await asyncio.sleep(max(0.0, start + index / rate - time.perf_counter()))
            group.create_task(_ask(client, tokens, load))
    return load


async def _ask(client: AsyncClient, tokens: int, load: Load) -> None:
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

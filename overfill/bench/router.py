"""What the router itself costs: CPU, latency, saturation, and what it does under overload (``overfill bench router``).

Real router, mock workers of known timing, all as processes of this machine; the client shares its cores. CPU is that of
the router's process, read before and after.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import psutil

from overfill.bench.protocols import mock_processes
from overfill.client import AsyncClient, Client
from overfill.errors import OverfillError, Overloaded
from overfill.params import SamplingParams

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


@dataclass(frozen=True, slots=True)
class RouterCost:
    """Attributes:
    request_us, token_us: CPU of the router's process, microseconds; a request's own cost, and each token's on top.
    requests_per_second, tokens_per_second: at saturation, with answers of one token and of ``LONG``.
    ttft_p50_ms, ttft_p99_ms: at half of the request saturation; mock workers take no time.
    """

    request_us: float
    token_us: float
    requests_per_second: float
    tokens_per_second: float
    ttft_p50_ms: float
    ttft_p99_ms: float


@dataclass(frozen=True, slots=True)
class Overload:
    """Ten times what the workers can take. Milliseconds, bytes."""

    capacity: float
    offered: float
    answered: int
    refused: int
    failed: int
    without_retry: int
    ttft_p50_ms: float
    ttft_p99_ms: float
    refused_p50_ms: float
    refused_p99_ms: float
    rss_before: int
    rss_after: int


def measure_cost(pair: Path, seconds: float) -> RouterCost:
    """Saturation with short and long answers, then latency at half of it; about three times ``seconds``."""
    with mock_processes(pair, STREAMS * 2) as (address, _):
        process = psutil.Process(_router_pid(address))
        one, one_us, one_rate = _saturate(address, process, 1, seconds)
        many, many_us, many_rate = _saturate(address, process, LONG, seconds)
        del one, many
        half = asyncio.run(_open_loop(address, one_rate / 2, seconds, 1))
    token_us = (many_us - one_us) / (LONG - 1)
    return RouterCost(
        one_us - token_us,
        token_us,
        one_rate,
        many_rate * LONG,
        half.percentile_ms(half.ttft, 50),
        half.percentile_ms(half.ttft, 99),
    )


def measure_overload(pair: Path, seconds: float, *, slots: int = 4, step: float = 0.05, tokens: int = 8) -> Overload:
    """Ten times the load that ``slots`` sequences of ``tokens`` steps of ``step`` seconds make, for ``seconds``."""
    capacity = slots / (step * tokens)
    worker = [f"--mock-step={step}"]
    with mock_processes(pair, slots, router=["--max-wait=1"], decode=worker) as (address, _):
        process = psutil.Process(_router_pid(address))
        asyncio.run(_open_loop(address, capacity * 2, 2.0, tokens))
        before = process.memory_info().rss
        load = asyncio.run(_open_loop(address, capacity * 10, seconds, tokens))
        after = process.memory_info().rss
    return Overload(
        capacity,
        capacity * 10,
        len(load.ttft),
        len(load.refused),
        load.failed,
        load.without_retry,
        load.percentile_ms(load.ttft, 50),
        load.percentile_ms(load.ttft, 99),
        load.percentile_ms(load.refused, 50),
        load.percentile_ms(load.refused, 99),
        before,
        after,
    )


def _router_pid(address: str) -> int:
    with Client(address) as client:
        pid = client.status().process.pid
    assert pid != os.getpid()
    return pid


def _saturate(address: str, process: psutil.Process, tokens: int, seconds: float) -> tuple[Load, float, float]:
    """The load, CPU microseconds of the router per request, and requests per second."""
    asyncio.run(_closed_loop(address, 0.5, tokens))
    before, start = process.cpu_times(), time.perf_counter()
    load = asyncio.run(_closed_loop(address, seconds, tokens))
    passed, after = time.perf_counter() - start, process.cpu_times()
    cpu = after.user + after.system - before.user - before.system
    return load, cpu / len(load.ttft) * 1e6, len(load.ttft) / passed


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

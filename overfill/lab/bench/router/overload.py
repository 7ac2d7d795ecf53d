"""Measures a router under ten times the load that its workers can take (``overfill bench router --overload``)."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import psutil

from overfill.client import AsyncClient
from overfill.errors import OverfillError, Overloaded
from overfill.lab.bench.measurement import Measurement
from overfill.lab.bench.router.mock_stack import mock_stack
from overfill.request.params import SamplingParams

PROMPT = tuple(range(10, 74))


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
    with mock_stack(pair, slots, router=[f"--max-wait={max_wait}"], times={"step": step}) as stack:
        process, address = psutil.Process(stack.router), stack.grpc
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

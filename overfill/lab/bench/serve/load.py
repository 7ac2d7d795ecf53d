"""Sends requests at their times, whatever becomes of earlier ones (open loop), and notes when tokens come."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import nullcontext
from typing import Protocol

from overfill.lab.traffic.outcome import Outcome
from overfill.lab.traffic.traces import TraceRequest

Progress = Callable[[int, int], None]


class RequestFailed(Exception):
    """The server did not answer a request, or not to its end; the message says how."""


class Target(Protocol):
    """Something that serves one request at a time, many times at once."""

    def stream(self, prompt: Sequence[int], max_tokens: int) -> AsyncIterator[int]:
        """How many tokens have come so far, with every message; fewer than before where the server corrects it.

        Raises:
            RequestFailed: it refused, broke off or ended without an answer.
        """


async def run_load(
    target: Target,
    requests: Sequence[TraceRequest],
    vocab_size: int,
    *,
    concurrency: int | None = None,
    timeout: float = 600.0,
    progress: Progress | None = None,
) -> list[Outcome]:
    """Plays ``requests`` and returns their outcomes in the same order.

    Args:
        concurrency: most requests on their way at once; a request that waits here counts from when it is sent, as in a
            closed loop. None: as many as the arrivals make.
        timeout: seconds that a request may take.
    """
    # Made beforehand: long prompts take a while.
    prompts = [request.prompt(vocab_size, seed) for seed, request in enumerate(requests)]
    gate = asyncio.Semaphore(concurrency) if concurrency is not None else nullcontext()
    start = time.perf_counter()
    done = 0

    def now() -> float:
        return time.perf_counter() - start

    async def one(request: TraceRequest, prompt: list[int]) -> Outcome:
        nonlocal done
        await asyncio.sleep(request.arrival - now())
        async with gate:
            due = request.arrival if concurrency is None else now()
            times: list[float] = []
            tokens = 0
            error: str | None = None
            try:
                async with asyncio.timeout(timeout):
                    async for tokens in target.stream(prompt, request.output_tokens):
                        times += [now()] * (tokens - len(times))
            except TimeoutError:
                error = f"not finished after {timeout:g} s"
            except RequestFailed as failure:
                error = str(failure)
        done += 1
        if progress is not None:
            progress(done, len(requests))
        return Outcome(due, tuple(times), error if error is not None or times else "no token came", counted=tokens)

    return list(await asyncio.gather(*(one(r, p) for r, p in zip(requests, prompts, strict=True))))

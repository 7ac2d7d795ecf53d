"""Sends requests at their times without waiting for earlier ones (open loop), and records when tokens arrive."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import nullcontext
from typing import Protocol

from overfill.lab.traffic.outcome import Outcome, RequestFailed
from overfill.lab.traffic.traces import TraceRequest

Progress = Callable[[int, int], None]


class Target(Protocol):
    """A server under load. Many streams run at once."""

    def stream(self, prompt: Sequence[int], max_tokens: int) -> AsyncIterator[int]:
        """Sends one request. Yields, with every message, the number of tokens received so far.

        The number may fall where the server corrects it.

        Raises:
            RequestFailed: The server refused the request, or broke off the answer.
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
        concurrency: Maximum concurrent requests. A request that waits for this limit is timed from when it is sent, as
            in a closed loop. None means no limit.
        timeout: Maximum seconds of a request.
        progress: Called with the number of finished requests and the number of all.
    """
    # Made before the start, because long prompts cost time.
    prompts = [request.prompt(vocab_size, seed) for seed, request in enumerate(requests)]
    limit = asyncio.Semaphore(concurrency) if concurrency is not None else nullcontext()
    start = time.perf_counter()
    done = 0

    def now() -> float:
        return time.perf_counter() - start

    async def one(request: TraceRequest, prompt: list[int]) -> Outcome:
        nonlocal done
        await asyncio.sleep(request.arrival - now())
        async with limit:
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
        return Outcome(due, tuple(times), error if error is not None or times else "no token arrived", counted=tokens)

    return list(await asyncio.gather(*(one(r, p) for r, p in zip(requests, prompts, strict=True))))

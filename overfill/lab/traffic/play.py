"""The load generator: sends requests in an open or a closed loop, and records when tokens arrive.

Benchmarks, load tests and fault trials all use its two loops.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from typing import Protocol

from overfill.lab.traffic.outcome import Outcome, RequestFailed
from overfill.lab.traffic.traces import TraceRequest

Progress = Callable[[int, int], None]

Send = Callable[[], Awaitable[object]]
"""Sends the next request and waits for its end. It raises nothing for a request that failed."""


class Target(Protocol):
    """A server under load. Many streams run at once."""

    def stream(self, prompt: Sequence[int], max_tokens: int) -> AsyncIterator[int]:
        """Sends one request. Yields, with every message, the number of tokens received so far.

        The number may fall where the server corrects it.

        Raises:
            RequestFailed: The server refused the request, or broke off the answer.
        """


def never() -> bool:
    return False


async def open_loop(send: Send, times: Iterable[float], over: Callable[[], bool] = never) -> None:
    """Sends a request at each of ``times``, without waiting for earlier ones. Returns when all have ended.

    Args:
        times: seconds from now, in order.
        over: ends the loop; asked before each request.
    """
    start = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for due in times:
            await asyncio.sleep(due - (time.perf_counter() - start))
            if over():
                return
            group.create_task(_await(send))


async def closed_loop(send: Send, users: int, over: Callable[[], bool]) -> None:
    """Keeps ``users`` requests running until ``over``. Returns when the last ones have ended."""

    async def user() -> None:
        while not over():
            await send()

    async with asyncio.TaskGroup() as group:
        for _ in range(users):
            group.create_task(user())


async def _await(send: Send) -> None:
    await send()


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
        concurrency: Number of requests that run at any time, as in a closed loop; arrivals do not count then, and a
            request is timed from when it is sent. None means an open loop, in which it is timed from its arrival.
        timeout: Maximum seconds of a request.
        progress: Called with the number of finished requests and the number of all.
    """
    # Made before the start, because long prompts cost time.
    prompts = [request.prompt(vocab_size, seed) for seed, request in enumerate(requests)]
    start = time.perf_counter()
    outcomes: dict[int, Outcome] = {}
    waiting = iter(range(len(requests)))
    left = len(requests)

    def now() -> float:
        return time.perf_counter() - start

    async def send() -> None:
        nonlocal left
        number, left = next(waiting), left - 1
        request = requests[number]
        sent = now()
        times: list[float] = []
        tokens = 0
        error: str | None = None
        try:
            async with asyncio.timeout(timeout):
                async for tokens in target.stream(prompts[number], request.output_tokens):
                    times += [now()] * (tokens - len(times))
        except TimeoutError:
            error = f"not finished after {timeout:g} s"
        except RequestFailed as failure:
            error = str(failure)
        if error is None and not times:
            error = "no token arrived"
        due = request.arrival if concurrency is None else sent
        outcomes[number] = Outcome(due, tuple(times), error, sent, counted=tokens)
        if progress is not None:
            progress(len(outcomes), len(requests))

    if concurrency is None:
        await open_loop(send, [request.arrival for request in requests])
    else:
        await closed_loop(send, concurrency, lambda: not left)
    return [outcomes[number] for number in range(len(requests))]

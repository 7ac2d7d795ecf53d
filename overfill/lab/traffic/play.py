"""The load generator: sends requests in an open or a closed loop, and records when tokens arrive.

Load tests, fault trials, ``bench quality`` and the own generator of ``bench curve`` use its two loops.
"""

from __future__ import annotations

import asyncio
import math
import time
from array import array
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from overfill.client.answers import Timing
from overfill.lab.traffic.outcome import Outcome, RequestFailed
from overfill.lab.traffic.traces import TraceRequest

Send = Callable[[], Coroutine[Any, Any, object]]
"""Sends the next request and waits for its end. It raises nothing for a request that failed."""

Users = int | Callable[[float], int]
"""Number of users of a closed loop, or a function that returns it for the seconds since the loop began."""

_USERS_SECONDS = 0.1
"""How often a closed loop asks for a number of users that changes."""

_PREPARE_SECONDS = 60.0
"""Maximum seconds for making prompts before the first request. The others are made when they are sent."""


@dataclass(slots=True)
class ReceivedAnswer:
    """What a server says about one answer at its end. A target fills it.

    Attributes:
        timing: The server's own breakdown of the time; None means unknown.
        tier: Tier that wrote the end of the answer; empty means unknown.
        text: The answer itself, of an OpenAI endpoint.
    """

    timing: Timing | None = None
    tier: str = ""
    text: str = ""


class Target(Protocol):
    """A server under load. Many streams run at once."""

    def stream(
        self, prompt: Sequence[int], max_tokens: int, received: ReceivedAnswer, tier: str = ""
    ) -> AsyncIterator[int]:
        """Sends one request. Yields, with every message, the number of tokens received so far.

        The number may fall where the server corrects it.

        Args:
            received: filled at the end of the answer.
            tier: Tier that the request names; empty means none.

        Raises:
            RequestFailed: The server refused the request, or broke off the answer.
        """


async def open_loop(send: Send, times: Iterable[float], over: Callable[[], bool] = lambda: False) -> None:
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
            group.create_task(send())


async def closed_loop(send: Send, users: Users, over: Callable[[], bool]) -> None:
    """Has ``users`` send requests until ``over``, each the next one after an answer.

    Users that are no longer wanted leave after their current answer. Returns when the last requests have ended.
    """
    start = time.perf_counter()
    running = 0

    def wanted() -> int:
        return users(time.perf_counter() - start) if callable(users) else users

    async def user() -> None:
        nonlocal running
        while running <= wanted() and not over():
            await send()
        running -= 1

    async with asyncio.TaskGroup() as group:
        while not over():
            for _ in range(wanted() - running):
                running += 1
                group.create_task(user())
            if not callable(users):
                return
            await asyncio.sleep(_USERS_SECONDS)


async def run_load(
    target: Target,
    requests: Iterable[TraceRequest],
    vocab_size: int,
    *,
    concurrency: Users | None = None,
    duration: float = math.inf,
    timeout: float = 600.0,
    ended: Callable[[Outcome], object] | None = None,
) -> list[Outcome]:
    """Plays ``requests`` and returns their outcomes in the same order.

    Args:
        requests: a sequence; with ``concurrency`` also an endless iterator, whose prompts are made when they are sent.
        concurrency: Number of requests that run at any time, as in a closed loop; arrivals do not count then, and a
            request is timed from when it is sent. None means an open loop, in which it is timed from its arrival.
        duration: Seconds after which no further request is sent. Those that run are waited for.
        timeout: Maximum seconds of a request.
        ended: Called with each outcome when its request has ended, also with those of an interrupted run.
    """
    prompts = _prepare(requests, vocab_size) if isinstance(requests, Sequence) else {}
    start = time.perf_counter()
    outcomes: dict[int, Outcome] = {}
    waiting = enumerate(requests)
    left = len(requests) if isinstance(requests, Sequence) else math.inf

    def now() -> float:
        return time.perf_counter() - start

    def over() -> bool:
        return left <= 0 or now() >= duration

    async def send() -> None:
        nonlocal left
        (number, request), left = next(waiting), left - 1
        prompt = prompts.pop(number, None) or request.prompt(vocab_size, number)
        sent, received = now(), ReceivedAnswer()
        times: list[float] = []
        tokens = 0
        error: str | None = "the run was interrupted"
        try:
            async with asyncio.timeout(timeout):
                async for tokens in target.stream(prompt, request.output_tokens, received, request.tier):
                    times += [now()] * (tokens - len(times))
            error = None if times else "no token arrived"
        except TimeoutError:
            error = f"not finished after {timeout:g} s"
        except RequestFailed as failure:
            error = str(failure)
        finally:
            due = request.arrival if concurrency is None else sent
            outcomes[number] = outcome = Outcome(
                due, tuple(times), error, sent, received.timing, tokens, request.tier, received.tier
            )
            if ended is not None:
                ended(outcome)

    if concurrency is None:
        await open_loop(send, [request.arrival for request in requests], over)
    else:
        await closed_loop(send, concurrency, over)
    return [outcome for _, outcome in sorted(outcomes.items())]


def _prepare(requests: Sequence[TraceRequest], vocab_size: int) -> dict[int, Sequence[int]]:
    """Makes prompts before the start: a long one that is made later would delay the tokens of other requests."""
    began, prompts = time.perf_counter(), dict[int, Sequence[int]]()
    for number, request in enumerate(requests):
        if time.perf_counter() - began > _PREPARE_SECONDS:
            break
        prompts[number] = array("I", request.prompt(vocab_size, number))
    return prompts

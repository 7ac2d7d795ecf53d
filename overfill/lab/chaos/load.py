"""Who asks while a stack breaks: greedy streams, some of which read slowly or vanish."""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import grpc.aio

from overfill.client import AsyncClient, ClientTls, SamplingParams
from overfill.errors import OverfillError, Overloaded, Unavailable

Ending = Literal["answered", "refused", "given up", "failed", "vanished"]

_TIMEOUT = 300.0  # seconds of a request; one that ends by it has failed
_SLOW = 0.15  # seconds that a slow reader takes for each part


@dataclass(slots=True)
class Outcome:
    """One request.

    Attributes:
        ending: "refused" when the stack would not take it, "given up" when it said, after losing too many workers, that
            another try may succeed; "failed" is any other error.
        longest_pause: seconds without a new token, the wait for the first one included.
        slow: whether the client took its time.
    """

    request: str
    prompt: Sequence[int]
    ending: Ending = "answered"
    error: str = ""
    token_ids: tuple[int, ...] = ()
    finish_reason: Literal["stop", "length", "tool_calls"] = "length"
    migrations: int = 0
    longest_pause: float = 0.0
    slow: bool = False


class Load:
    """Asks the routers at ``addresses``, first the one or the other, and keeps what came of it.

    Args:
        max_tokens: longest answer.
    """

    def __init__(
        self,
        addresses: Sequence[str],
        tls: ClientTls | None,
        prompts: Sequence[Sequence[int]],
        max_tokens: int,
        seed: int,
    ) -> None:
        self._addresses = addresses
        self._tls = tls
        self._prompts = prompts
        self._max_tokens = max_tokens
        self._rng = random.Random(seed)
        self._numbers = itertools.count()
        self._idle: list[AsyncClient] = []
        self._running: dict[str, tuple[AsyncClient, Outcome]] = {}
        self.outcomes: list[Outcome] = []

    @property
    def running(self) -> int:
        return len(self._running)

    async def ask(self) -> Outcome:
        """One request, to its end."""
        number = next(self._numbers)
        client = self._idle.pop() if self._idle else self._connect(number)
        outcome = Outcome(f"chaos-{number}", self._prompts[number % len(self._prompts)])
        self._running[outcome.request] = client, outcome
        try:
            await self._read(client, outcome)
        except OverfillError as error:
            outcome.error = f"{type(error).__name__}: {error}"
            if outcome.ending != "vanished":
                outcome.ending = _ending(error)
        except (asyncio.CancelledError, grpc.aio.UsageError):
            if outcome.ending != "vanished":  # which is how gRPC tells of a channel that was closed
                raise
        finally:
            del self._running[outcome.request]
        if outcome.ending == "vanished":
            await client.close()
        else:
            self._idle.append(client)
        self.outcomes.append(outcome)
        return outcome

    async def keep_asking(self, until: asyncio.Event) -> None:
        """One request after the other."""
        while not until.is_set():
            await self.ask()

    async def keep_arriving(self, rate: float, until: asyncio.Event) -> None:
        """``rate`` requests per second at random moments, whatever becomes of them; returns when all have ended."""
        async with asyncio.TaskGroup() as group:
            while not until.is_set():
                await asyncio.sleep(self._rng.expovariate(rate))
                group.create_task(self.ask())

    async def vanish(self, request: str) -> bool:
        """Its client closes its connections as if it had died; False when it has its answer by now."""
        if request not in self._running:
            return False
        client, outcome = self._running[request]
        outcome.ending = "vanished"
        await client.close()
        return True

    def slow_down(self, request: str) -> bool:
        """Its client takes its time from now on; False when it has its answer by now."""
        if request not in self._running:
            return False
        self._running[request][1].slow = True
        return True

    async def close(self) -> None:
        for client in self._idle:
            await client.close()

    async def _read(self, client: AsyncClient, outcome: Outcome) -> None:
        sampling = SamplingParams(temperature=0, max_tokens=self._max_tokens)
        last = time.monotonic()
        options = {"sampling": sampling, "request_id": outcome.request, "timeout": _TIMEOUT}
        async with client.stream(outcome.prompt, **options) as stream:  # type: ignore[arg-type]
            async for delta in stream:
                if delta.token_ids:
                    now = time.monotonic()
                    outcome.longest_pause = max(outcome.longest_pause, now - last)
                    last = now
                if outcome.slow:
                    await asyncio.sleep(_SLOW)
            answer = stream.answer
        outcome.token_ids, outcome.finish_reason = answer.token_ids, answer.finish_reason
        outcome.migrations = answer.migrations

    def _connect(self, number: int) -> AsyncClient:
        first = number % len(self._addresses)
        return AsyncClient(",".join([*self._addresses[first:], *self._addresses[:first]]), tls=self._tls)


def _ending(error: OverfillError) -> Ending:
    if isinstance(error, Overloaded):
        return "refused"
    return "given up" if isinstance(error, Unavailable) else "failed"

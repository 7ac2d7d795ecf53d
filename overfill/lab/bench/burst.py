"""A burst of requests on a running stack, and how its pools follow: open loop, workers and work sampled every second.

Knows nothing of who starts and stops the workers.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from overfill.client import AsyncClient, SamplingParams
from overfill.errors import OverfillError

_SAMPLE = 1.0  # seconds between samples


@dataclass(frozen=True, slots=True)
class Burst:
    """Poisson arrivals: ``rate`` for ``before`` seconds, ``burst_rate`` for ``during``, ``rate`` again for ``after``.

    Attributes:
        rate, burst_rate: requests per second.
        prompt_words, max_tokens: of each request; answers are greedy.
    """

    before: float
    during: float
    after: float
    rate: float
    burst_rate: float
    prompt_words: int
    max_tokens: int
    seed: int = 0

    def arrivals(self) -> list[float]:
        """When requests come, seconds from the start."""
        draw, times, now = random.Random(self.seed), list[float](), 0.0
        for length, rate in ((self.before, self.rate), (self.during, self.burst_rate), (self.after, self.rate)):
            end = now + length
            while rate > 0 and (now := now + draw.expovariate(rate)) < end:
                times.append(now)
            now = end
        return times


@dataclass(frozen=True, slots=True)
class Sample:
    """The stack ``at`` seconds: workers that take work by stage, and requests on or before the decode workers."""

    at: float
    prefill: int
    decode: int
    requests: int


@dataclass(slots=True)
class BurstResult:
    """What came of it. ``ttft`` and ``itl`` are seconds by moment of arrival: (arrival, value)."""

    burst: Burst
    samples: list[Sample] = field(default_factory=list)
    ttft: list[tuple[float, float]] = field(default_factory=list)
    itl: list[tuple[float, float]] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    migrations: int = 0

    @property
    def answers(self) -> int:
        return len(self.ttft)

    def most(self, stage: str) -> int:
        """Most workers of a stage at a time."""
        most: int = max(getattr(sample, stage) for sample in self.samples)
        return most


async def run_burst(client: AsyncClient, burst: Burst, report: Callable[[str, int, int], None]) -> BurstResult:
    """Runs ``burst`` on the stack of ``client``, watching it to the end of ``after``."""
    loop = asyncio.get_running_loop()
    result, start = BurstResult(burst), loop.time()
    arrivals = burst.arrivals()
    active = 0

    async def ask(at: float) -> None:
        nonlocal active
        active += 1
        prompt = " ".join(f"word{random.Random(at).randrange(1000)}" for _ in range(burst.prompt_words))
        try:
            answer = await client.generate(
                prompt, sampling=SamplingParams(temperature=0, max_tokens=burst.max_tokens), timeout=300
            )
        except OverfillError as error:
            result.errors.append(f"{at:.1f} s: {error}")
        else:
            timing = answer.timing
            result.ttft.append((at, timing.ttft or 0.0))
            if timing.decode and len(answer.token_ids) > 1:
                result.itl.append((at, timing.decode / (len(answer.token_ids) - 1)))
            result.migrations += answer.migrations
        finally:
            active -= 1
            report("Answering", result.answers + len(result.errors), len(arrivals))

    async def watch() -> None:
        while True:
            try:
                status = await client.status(timeout=5)
            except OverfillError:
                status = None
            if status is not None:
                ready = [w.stage for w in status.workers if w.process is None or not w.process.draining]
                sample = Sample(loop.time() - start, ready.count("prefill"), ready.count("decode"), active)
                result.samples.append(sample)
            await asyncio.sleep(_SAMPLE)

    watching = asyncio.create_task(watch())
    async with asyncio.TaskGroup() as requests:
        for at in arrivals:
            await asyncio.sleep(max(0.0, start + at - loop.time()))
            requests.create_task(ask(at))
    await asyncio.sleep(max(0.0, start + burst.before + burst.during + burst.after - loop.time()))
    watching.cancel()
    return result


def quantile(values: Sequence[float], share: float) -> float:
    """The smallest of ``values`` that ``share`` of them do not exceed; 0 without any."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0

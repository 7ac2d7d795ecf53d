"""Several tasks over one prompt: a stack that shares the prompt, one that does not, and vLLM with the same adapters.

A *fan-out* is one prompt with one request per task. Each system gets the same prompts of random tokens, over HTTP.

- **Apart**: the first task runs alone; once it has its first token, the other tasks start at once.
- **At once**: all tasks of a prompt start together, and ``concurrency`` fan-outs run at a time.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from overfill.client import Client
from overfill.lab.bench.measurement import Measurement
from overfill.lab.bench.serve.targets import OpenAiTarget
from overfill.settings.values import EngineChoice
from overfill.stack.describe import describe
from overfill.stack.placed import place
from overfill.stack.process_runner import running

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class FanOutLoad:
    """The load on each system.

    Attributes:
        tasks: names of the tasks' adapters; the same in each system.
        prompt_tokens, answer_tokens: lengths of each prompt and answer.
        fan_outs: number of prompts in each of the two measurements.
        concurrency: fan-outs that run at a time in the second one.
        vocab_size: token ids of prompts are below it.
    """

    tasks: Sequence[str]
    prompt_tokens: int
    answer_tokens: int
    fan_outs: int
    concurrency: int
    vocab_size: int

    def prompts(self, seed: int) -> list[list[int]]:
        """Makes the prompts of one measurement; each seed has other ones."""
        draw = random.Random(seed)
        count = self.fan_outs + 1  # one warms up
        return [[draw.randrange(20, self.vocab_size) for _ in range(self.prompt_tokens)] for _ in range(count)]


@dataclass(slots=True)
class FanOutFigures:
    """What one system did.

    Attributes:
        first: seconds to the first token of the tasks that came first, apart.
        later: seconds to the first token of the tasks that came after it.
        seconds: duration of the second measurement.
        fan_outs: number of its fan-outs.
        computed: prompt tokens that a prompt's tasks made the system compute, ÷ its length; None where unknown.
    """

    first: list[float] = field(default_factory=list)
    later: list[float] = field(default_factory=list)
    seconds: float = 0.0
    fan_outs: int = 0
    computed: float | None = None

    @property
    def per_second(self) -> float:
        return self.fan_outs / self.seconds


async def run_fan_outs(url: str, prefix: str, load: FanOutLoad, report: Progress) -> FanOutFigures:
    """Runs both measurements on the endpoint ``url``; one fan-out warms up before each.

    Args:
        prefix: what comes before a task's name in the model's name.
        report: takes the numbers of fan-outs done, and of all.
    """
    total = 2 * load.fan_outs
    figures = FanOutFigures(fan_outs=load.fan_outs)
    async with AsyncExitStack() as exits:
        targets = [await exits.enter_async_context(OpenAiTarget(url, prefix + task)) for task in load.tasks]
        for number, prompt in enumerate(load.prompts(0)):
            first, later = await _apart(targets, prompt, load.answer_tokens)
            if number:
                figures.first.append(first)
                figures.later += later
            report(number, total)
        warm_up, *prompts = load.prompts(1)
        await _at_once(targets, warm_up, load.answer_tokens)
        waiting, done = iter(prompts), 0

        async def work() -> None:
            nonlocal done
            for prompt in waiting:
                await _at_once(targets, prompt, load.answer_tokens)
                done += 1
                report(load.fan_outs + done, total)

        started = time.monotonic()
        async with asyncio.TaskGroup() as group:
            for _ in range(load.concurrency):
                group.create_task(work())
        figures.seconds = time.monotonic() - started
    return figures


async def _apart(targets: Sequence[OpenAiTarget], prompt: Sequence[int], tokens: int) -> tuple[float, list[float]]:
    """Returns the first task's seconds to the first token, and those of the others, which start then."""
    leader, *others = targets
    started = time.monotonic()
    stream = leader.stream(prompt, tokens)
    await _first_token(stream)
    first = time.monotonic() - started
    rest = asyncio.ensure_future(_drain(stream))
    later = await asyncio.gather(*(_time_to_first(other.stream(prompt, tokens)) for other in others))
    await rest
    return first, later


async def _at_once(targets: Sequence[OpenAiTarget], prompt: Sequence[int], tokens: int) -> None:
    await asyncio.gather(*(_drain(target.stream(prompt, tokens)) for target in targets))


async def _time_to_first(stream: AsyncIterator[int]) -> float:
    started = time.monotonic()
    await _first_token(stream)
    first = time.monotonic() - started
    await _drain(stream)
    return first


async def _first_token(stream: AsyncIterator[int]) -> None:
    while not await anext(stream):
        pass


async def _drain(stream: AsyncIterator[int]) -> None:
    async for _ in stream:
        pass


@contextmanager
def adapter_stack(
    pair: Path,
    adapters: Path,
    load: FanOutLoad,
    threads: int,
    shares: bool,
    engine: EngineChoice,
    log: Callable[[str, str], None],
) -> Iterator[tuple[str, str, str]]:
    """Starts a stack of one worker per stage. Yields its endpoint's URL, the model's name and the router's address.

    Args:
        shares: whether the workers cache prompts. Without that, each task has a prefill and a transfer of its own.
    """
    settings = {
        "adapters": adapters,
        "max_adapters": len(load.tasks),
        "prefix_cache": shares,
        "engine": engine,
        "max_model_len": load.prompt_tokens + load.answer_tokens + 16,
        "max_num_batched_tokens": max(2048, load.prompt_tokens),
        "log_level": "error",
        "grace_period": 2,
    }
    with running(place(describe(pair, http=0, threads=threads, settings=settings)), log) as stack:
        with Client(stack.addresses[0]) as client:
            http, model = client.status().http_address, client.models()[0].name
        yield f"http://{http}/v1", model, stack.addresses[0]


def prompt_tokens_computed(address: str) -> int:
    """Returns the prompt tokens that the prefill workers of a router have computed since they started."""
    with Client(address) as client:
        loads = [w.process.load for w in client.status().workers if w.stage == "prefill" and w.process is not None]
    return sum(load.prefix_tokens_looked_up - load.prefix_tokens_found for load in loads if load is not None)


def measurements_of(ours: FanOutFigures, alone: FanOutFigures, peer: FanOutFigures | None) -> list[Measurement]:
    """Returns the figures of a stack that shares prompts, of one that does not, and of vLLM if it was measured."""
    assert ours.computed is not None, "a stack of ours says what it has computed"
    prompt = Measurement(
        "fan_out_prompt_tokens", ours.computed, "of one prompt", 1.1, peer="not shared", peer_value=alone.computed
    )
    found = [prompt]
    for name, figures in (("shared", ours), ("not_shared", alone), ("vllm", peer)):
        if figures is not None:
            found += [
                Measurement(f"fan_out_first_{name}", 1e3 * _p95(figures.first), "ms, p95"),
                Measurement(f"fan_out_later_{name}", 1e3 * _p95(figures.later), "ms, p95"),
                Measurement(f"fan_outs_{name}", figures.per_second, "per second"),
            ]
    found.append(Measurement("fan_outs_ratio_not_shared", ours.per_second / alone.per_second, "x", 2.0, at_least=True))
    if peer is not None:
        found.append(Measurement("fan_out_later_ratio_vllm", _p95(ours.later) / _p95(peer.later), "x", 0.3))
        found.append(Measurement("fan_outs_ratio_vllm", ours.per_second / peer.per_second, "x", 2.5, at_least=True))
    return found


def _p95(seconds: Sequence[float]) -> float:
    return float(np.percentile(seconds, 95))

"""Chats of several turns with and without prefix caches: how long a late turn waits for its first token."""

from __future__ import annotations

import random
import statistics
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from overfill.cli.stack import Stack
from overfill.cli.up_plan import make_plan
from overfill.client import Client, SamplingParams
from overfill.errors import InternalError
from overfill.kv.spec import DTypeName
from overfill.lab.bench.figure import Figure
from overfill.model.manifest import Pair


@dataclass(frozen=True, slots=True)
class _Chats:
    """What chats took with one setting of the prefix cache.

    Attributes:
        ttft: median seconds to the first token, by turn.
        prompt_tokens: of the last turn, on average.
        hit_rate: share of all prompt tokens that the prefill worker found; held_rate: that did not travel.
    """

    ttft: list[float]
    prompt_tokens: float
    hit_rate: float
    held_rate: float


def measure_chats(
    pair: Pair,
    *,
    turns: int,
    chats: int,
    turn_tokens: int,
    answer_tokens: int,
    dtype: DTypeName | None,
    threads: int,
    log: Callable[[str, str], None],
) -> list[Figure]:
    """``chats`` chats, one after the other, of ``turns`` turns, each ``turn_tokens`` random tokens longer; with and
    without prefix caches.

    Raises:
        StartFailed: a stack did not come up.
    """
    on, off = (
        _measure(pair, cache, turns, chats, turn_tokens, answer_tokens, dtype, threads, log) for cache in ("on", "off")
    )

    def beside(name: str, value: float, unit: str, without: float) -> Figure:
        return Figure(name, value, unit, peer="without caches", peer_value=without)

    return [
        *(
            beside(f"ttft_turn_{turn}", 1e3 * ours, "ms", 1e3 * theirs)
            for turn, (ours, theirs) in enumerate(zip(on.ttft, off.ttft, strict=True), 1)
        ),
        beside("prompt_of_the_last_turn", on.prompt_tokens, "tokens", off.prompt_tokens),
        beside("hit_rate", on.hit_rate, "of prompt tokens", off.hit_rate),
        beside("did_not_travel", on.held_rate, "of prompt tokens", off.held_rate),
    ]


def _measure(
    pair: Pair,
    cache: Literal["on", "off"],
    turns: int,
    chats: int,
    turn_tokens: int,
    answer_tokens: int,
    dtype: DTypeName | None,
    threads: int,
    log: Callable[[str, str], None],
) -> _Chats:
    settings = {"dtype": dtype, "log_level": "error", "grace_period": 2, "prefix_cache": cache}
    plan = make_plan(pair.folder, 1, 1, 1, 0, threads, settings)
    stack = Stack(plan, log)
    greedy = SamplingParams(temperature=0, max_tokens=answer_tokens, ignore_eos=True)
    ttft: list[list[float]] = [[] for _ in range(turns)]
    prompt_tokens = found = held = 0
    last: list[int] = []
    rng = random.Random(0)
    try:
        stack.start()
        stack.wait_ready(threading.Event())
        with Client(plan.addresses[0]) as client:
            client.generate([1] * turn_tokens, sampling=greedy)  # pays for connections
            for _ in range(chats):
                prompt: list[int] = []
                for turn in range(turns):
                    prompt = [*prompt, *(rng.randrange(pair.full_config.vocab_size) for _ in range(turn_tokens))]
                    answer = client.generate(prompt, sampling=greedy, trace=True)
                    if answer.timing.ttft is None or answer.trace is None:
                        raise InternalError("the stack did not say where the time went")
                    ttft[turn].append(answer.timing.ttft)
                    prompt_tokens += len(prompt)
                    found += answer.usage.cached_tokens
                    held += answer.trace.held_tokens
                    if turn == turns - 1:
                        last.append(len(prompt))
                    prompt = [*prompt, *answer.token_ids]
    finally:
        stack.stop()
    medians = [statistics.median(values) for values in ttft]
    return _Chats(medians, statistics.fmean(last), found / prompt_tokens, held / prompt_tokens)

"""What a handoff costs a request: time to the first token beside a plain prefill, and what the second token waits.

A stack of one prefill and one decode worker answers fresh prompts; in the same rounds, a prefill engine in this process
with the same weights and threads computes prompts of the same length, and hands nothing over.
"""

from __future__ import annotations

import gc
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from overfill.cli.stack import Stack
from overfill.cli.up_plan import make_plan
from overfill.client import Client, SamplingParams
from overfill.engine.build import build_engine_parts
from overfill.engine.prefill import PrefillEngine
from overfill.engine.sequence import PrefillEvent, PrefillSequence, PromptComputed, Release, Submit
from overfill.errors import InternalError
from overfill.kv.spec import DTypeName
from overfill.lab.bench.figure import Figure
from overfill.model.manifest import Pair
from overfill.request.params import SamplingParams as EngineSampling

MOST_EXPOSED = 0.05
"""Share of the prefill that the second token may wait for the handoff."""

MOST_TTFT = 1.10
"""Multiple of a plain prefill that the time to the first token may be."""


@dataclass(frozen=True, slots=True)
class Round:
    """Seconds of one request and of one plain prefill beside it.

    Attributes:
        ttft: as the router measures it.
        exposed: from the first token's arrival to the start of the first decode step.
    """

    ttft: float
    prefill: float
    exposed: float
    plain: float


def measure_handoff(
    pair: Pair,
    tokens: int,
    *,
    dtype: DTypeName | None,
    threads: int,
    rounds: int,
    shm: str,
    kv_codec: str,
    log: Callable[[str, str], None],
) -> list[Figure]:
    """Measures ``rounds`` requests of ``tokens`` random tokens, after one that is not counted.

    Args:
        threads: of each worker; this process, which computes the plain prefills, uses ``cpu_settings`` for as many.

    Raises:
        StartFailed: the stack did not come up.
    """
    settings = {"dtype": dtype, "log_level": "error", "max_num_batched_tokens": tokens, "grace_period": 2}
    settings |= {"shm": shm, "kv_codec": kv_codec}
    plan = make_plan(pair.folder, 1, 1, 1, 0, threads, settings)
    stack = Stack(plan, log)
    plain = _PlainPrefill(pair, dtype, tokens)
    rng = random.Random(0)
    vocab = pair.full_config.vocab_size
    measured: list[Round] = []
    gc.freeze()  # as in a worker
    try:
        stack.start()
        stack.wait_ready(threading.Event())
        with Client(plan.addresses[0]) as client:
            greedy = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
            for number in range(rounds + 1):
                prompt = [rng.randrange(vocab) for _ in range(tokens)]
                seconds = plain.run(prompt) if number % 2 else 0.0  # neither is always the first
                answer = client.generate(prompt, sampling=greedy)
                seconds = seconds or plain.run(prompt)
                timing = answer.timing
                if timing.ttft is None or timing.prefill_compute is None or timing.handoff_exposed is None:
                    raise InternalError("the stack did not say where the time went")
                if number:
                    measured.append(Round(timing.ttft, timing.prefill_compute, timing.handoff_exposed, seconds))
    finally:
        stack.stop()
    plain_ms = Figure.median("plain_prefill", [1e3 * r.plain for r in measured], "ms")
    return [
        plain_ms,
        Figure.median("ttft", [1e3 * r.ttft for r in measured], "ms", peer="plain prefill", peer_value=plain_ms.value),
        Figure.median("ttft_ratio", [r.ttft / r.plain for r in measured], "of a plain prefill", MOST_TTFT),
        Figure.median("prefill_compute", [1e3 * r.prefill for r in measured], "ms"),
        Figure.median("handoff_exposed_ms", [1e3 * r.exposed for r in measured], "ms"),
        Figure.median("handoff_exposed", [r.exposed / r.prefill for r in measured], "of the prefill", MOST_EXPOSED),
    ]


class _PlainPrefill:
    """The prefill engine of a worker, in this process, without anybody who takes the KV."""

    def __init__(self, pair: Pair, dtype: DTypeName | None, tokens: int) -> None:
        parts = build_engine_parts(
            pair,
            "full",
            dtype=dtype,
            device=torch.device("cpu"),
            block_size=16,
            kv_memory=None,
            max_model_len=None,
            warm_tokens=tokens,
        )
        self._events: list[PrefillEvent] = []
        self._engine = PrefillEngine(parts.runner, parts.pool, tokens, 1, self._events.extend)

    def run(self, prompt: list[int]) -> float:
        """Seconds until the first token of ``prompt`` is known."""
        self._events.clear()
        started = time.perf_counter()
        self._engine.handle(Submit(PrefillSequence("plain", prompt, EngineSampling(temperature=0))))
        while not any(isinstance(event, PromptComputed) for event in self._events):
            if not self._engine.step():
                raise InternalError("the prompt was not computed")
        seconds = time.perf_counter() - started
        self._engine.handle(Release("plain"))
        return seconds

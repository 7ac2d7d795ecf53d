"""Measures what a handoff costs a request: time to first token, and how long the second token waits for KV.

A stack of one prefill and one decode worker answers random prompts. The peer is a prefill engine in this process, with
the same weights and threads, that computes the same prompts and hands nothing over.
"""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from overfill.client import Client, SamplingParams
from overfill.engine.load import load_engine
from overfill.engine.protocol import EngineOptions
from overfill.engine.sequence import PrefillEvent, PrefillSequence, PromptComputed, Release, Submit
from overfill.errors import InternalError
from overfill.kv.spec import DTypeName
from overfill.lab.bench.measurement import Measurement
from overfill.model.manifest import Pair
from overfill.request.params import SamplingParams as EngineSampling
from overfill.stack.describe import describe
from overfill.stack.placed import place
from overfill.stack.process_runner import running
from overfill.telemetry.metrics import PrefillMetrics

MAX_EXPOSED_SHARE = 0.05
"""Upper limit of the second token's wait for KV, as a share of the prefill."""

MAX_TTFT_RATIO = 1.10
"""Upper limit of the time to first token, as a multiple of a plain prefill."""


@dataclass(frozen=True, slots=True)
class HandoffRound:
    """Seconds of one request, and of the plain prefill of the same prompt.

    Attributes:
        ttft: Time to first token, as the router measures it.
        prefill: Prefill compute of the worker.
        exposed: Time from the first token's arrival to the start of the first decode step.
        plain: The plain prefill.
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
    shm: bool,
    kv_codec: str,
    log: Callable[[str, str], None],
) -> list[Measurement]:
    """Measures ``rounds`` requests of ``tokens`` random tokens, after a warm-up request.

    Args:
        threads: CPU threads of each worker. The caller sets this process, which runs the plain prefills, to as many.
        log: Called with a worker's name and each line of its output.

    Raises:
        StartFailed: The stack did not start.
    """
    settings = {"dtype": dtype, "log_level": "error", "max_num_batched_tokens": tokens, "grace_period": 2}
    settings |= {"shm": shm, "kv_codec": kv_codec}
    placed = place(describe(pair.folder, threads=threads, settings=settings))
    plain = _PlainPrefill(pair, dtype, tokens)
    rng = random.Random(0)
    vocab = pair.full_config.vocab_size
    measured: list[HandoffRound] = []
    gc.freeze()  # as in a worker
    with running(placed, log) as stack, Client(stack.addresses[0]) as client:
        greedy = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
        for number in range(rounds + 1):
            prompt = [rng.randrange(vocab) for _ in range(tokens)]
            seconds = plain.run(prompt) if number % 2 else 0.0  # alternate which of the two runs first
            answer = client.generate(prompt, sampling=greedy)
            seconds = seconds or plain.run(prompt)
            timing = answer.timing
            if timing.ttft is None or timing.prefill_compute is None or timing.handoff_exposed is None:
                raise InternalError(
                    "the answer has no timing for time to first token, prefill compute or exposed handoff"
                )
            if number:
                measured.append(HandoffRound(timing.ttft, timing.prefill_compute, timing.handoff_exposed, seconds))
    plain_ms = Measurement.median("plain_prefill", [1e3 * r.plain for r in measured], "ms")
    return [
        plain_ms,
        Measurement.median(
            "ttft", [1e3 * r.ttft for r in measured], "ms", peer="plain prefill", peer_value=plain_ms.value
        ),
        Measurement.median("ttft_ratio", [r.ttft / r.plain for r in measured], "of a plain prefill", MAX_TTFT_RATIO),
        Measurement.median("prefill_compute", [1e3 * r.prefill for r in measured], "ms"),
        Measurement.median("handoff_exposed_ms", [1e3 * r.exposed for r in measured], "ms"),
        Measurement.median(
            "handoff_exposed", [r.exposed / r.prefill for r in measured], "of the prefill", MAX_EXPOSED_SHARE
        ),
    ]


class _PlainPrefill:
    """A worker's prefill engine in this process. Its KV is not sent anywhere."""

    def __init__(self, pair: Pair, dtype: DTypeName | None, tokens: int) -> None:
        options = EngineOptions(
            torch.device("cpu"), dtype, max_num_seqs=1, max_num_batched_tokens=tokens, prefix_cache=False
        )
        self._events: list[PrefillEvent] = []
        self._engine = load_engine("overfill", pair, "full", options).new_core(self._events.extend, PrefillMetrics())

    def run(self, prompt: list[int]) -> float:
        """Computes ``prompt``. Returns the seconds until its first token."""
        self._events.clear()
        started = time.perf_counter()
        self._engine.handle(Submit(PrefillSequence("plain", prompt, EngineSampling(temperature=0))))
        while not any(isinstance(event, PromptComputed) for event in self._events):
            if not self._engine.step():
                raise InternalError("the prompt was not computed")
        seconds = time.perf_counter() - started
        self._engine.handle(Release("plain"))
        return seconds

"""Runs ``overfill bench vllm``: answers are checked first, then the engines take turns, one busy at a time."""

from __future__ import annotations

import random
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import TypeVar

from overfill.engine.device import resolve_device
from overfill.errors import InternalError
from overfill.kv.spec import DTYPE_BYTES, DTypeName
from overfill.kv.tensors import TORCH_DTYPES
from overfill.lab.bench.engine.bounds import ModelCost, decode_step_seconds, prefill_seconds
from overfill.lab.bench.engine.machine import Machine, MachineProbe, median_machine
from overfill.lab.bench.vllm.check import Answers, ask_questions, judge_answers, unaffordable
from overfill.lab.bench.vllm.engines import (
    Log,
    PlainEngine,
    StackEngine,
    VllmSettings,
    both_stacks,
    prompt_tokens_computed,
    two_stage_stack,
)
from overfill.lab.bench.vllm.figures import (
    DecodeRound,
    Figure,
    PromptRound,
    decode_figures,
    mean_context,
    prompt_figures,
)
from overfill.making.identity_pair import identity_pair
from overfill.model.config import ModelConfig
from overfill.model.manifest import Pair
from overfill.stack.child import StartFailed
from overfill.telemetry.progress import Report

_T = TypeVar("_T")

DECODE_PROMPT = 128
"""Tokens of each prompt of a decode turn."""

MAX_ANSWER = 1024
"""Maximum tokens of a sequence in a decode turn. It ends when all sequences have decoded ``_STEPS`` together."""

ANSWER = 8
"""Tokens of an answer to a measured prompt."""

_STEPS = 64
_PAUSE = 1.25
"""Seconds before a turn. Processes of plain vLLM spin for a second after their last message."""


@dataclass(frozen=True, slots=True)
class VllmPlan:
    """What a run measures.

    Attributes:
        batches: Sequences that decode together.
        prompts: Prompt lengths as the user gave them; those that do not fit the context are shortened.
        rounds: Turns of each engine.
    """

    batches: tuple[int, ...]
    prompts: tuple[int, ...]
    rounds: int

    def lengths(self, context: int) -> dict[int, int]:
        """Length that was asked for -> length that fits a context of ``context`` tokens."""
        return {asked: min(asked, context - ANSWER) for asked in self.prompts}

    def max_model_len(self, context: int) -> int:
        """Maximum tokens of a prompt and its answer."""
        longest = max(self.lengths(context).values()) + ANSWER
        return min(context, max(longest, DECODE_PROMPT + MAX_ANSWER))

    def kv_tokens(self, context: int) -> int:
        """Tokens for which a KV cache needs memory."""
        per_sequence = min(context, DECODE_PROMPT + MAX_ANSWER)
        return max(max(self.batches) * per_sequence, self.max_model_len(context))


def measure_vllm(
    pair: Pair, plan: VllmPlan, settings: VllmSettings, note: Callable[[str], None], report: Report, log: Log
) -> Iterator[Figure]:
    """Checks answers, then measures. Yields each figure when it is known.

    Args:
        note: Called with a sentence about a part that could not run.
        log: Called with the name and each line of output of our processes.

    Raises:
        StartFailed, PeerFailed: an engine did not start.
    """
    with ExitStack() as stack:
        folder = stack.enter_context(identity_pair(pair.full_path, report=report))
        reason = unaffordable(pair)
        if reason is not None:
            note(f"answers were not checked: {reason}")
        exact = None
        if reason is None and settings.dtype != "float32":
            exact = _exact_answers(pair, settings, note, report, log)
        report("Starting router and workers", 0, 1)
        decoder, full = stack.enter_context(both_stacks(pair, folder, settings, log))
        report("Starting router and workers", 1, 1)
        if reason is None:
            answers = ask_questions(decoder.address, report)
            if settings.dtype == "float32":
                yield from judge_answers(pair, answers, None, report)
            else:
                yield from judge_answers(pair, exact, answers, report)
        engines = _Engines(decoder, full, *_plain_engines(stack, pair, settings, report))
        yield from _Run(pair, plan, settings, engines, report).figures()
        computed = sum(prompt_tokens_computed(engine.address) for engine in (decoder, full))
        yield Figure("decoder_prompt_tokens", computed, "tokens", 0)


def _exact_answers(
    pair: Pair, settings: VllmSettings, note: Callable[[str], None], report: Report, log: Log
) -> Answers | None:
    """Answers of a stack in float32; None if it does not start."""
    report("Checking answers in float32", 0, 1)
    try:
        # Twice the bytes for as many tokens.
        with two_stage_stack(
            pair, replace(settings, dtype="float32", kv_memory=2 * settings.kv_memory), log
        ) as address:
            return ask_questions(address, report)
    except StartFailed as error:
        note("\n".join([f"answers were not checked in float32: {error}", *getattr(error, "__notes__", ())]))
        return None
    finally:
        report("Checking answers in float32", 1, 1)


def _plain_engines(
    stack: ExitStack, pair: Pair, settings: VllmSettings, report: Report
) -> tuple[PlainEngine, PlainEngine]:
    logs = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="overfill-bench-")))
    engines: list[PlainEngine] = []
    for name, model in (("decoder", pair.decoder_path), ("full", pair.full_path)):
        report("Starting plain vLLM", len(engines), 2)
        engine = PlainEngine(f"plain vLLM of the {name}", model, settings, logs / name)
        engines.append(stack.enter_context(closing(engine)))
    report("Starting plain vLLM", 2, 2)
    return engines[0], engines[1]


@dataclass(frozen=True, slots=True)
class _Engines:
    decoder: StackEngine
    full: StackEngine
    plain_decoder: PlainEngine
    plain_full: PlainEngine


class _Run:
    """The measured part of a run, with all engines open."""

    def __init__(self, pair: Pair, plan: VllmPlan, settings: VllmSettings, engines: _Engines, report: Report) -> None:
        self._pair, self._plan, self._settings, self._engines, self._report = pair, plan, settings, engines, report
        self._rng = random.Random(0)
        device = resolve_device(settings.device)
        self._probe = MachineProbe(device, TORCH_DTYPES[settings.dtype], settings.threads)
        self._machines: list[Machine] = []
        self._costs = {
            "decoder": model_cost(pair.decoder_config, settings.dtype),
            "full": model_cost(pair.full_config, settings.dtype),
        }

    def figures(self) -> Iterator[Figure]:
        lengths = self._plan.lengths(self._pair.full_config.max_positions)
        self._report("Warming up", 0, 1)
        self._decode_round(max(self._plan.batches), 8)
        self._prompt_round(min(lengths.values()))
        self._report("Warming up", 1, 1)
        for batch in self._plan.batches:
            yield from self._decode_figures(batch)
        for asked, length in lengths.items():
            yield from self._prompt_figures(asked, length)
        machine = median_machine(self._machines)
        yield Figure("bandwidth", machine.bandwidth / 1e9, "GB/s")
        yield Figure("matrix_rate", machine.matrix_rate / 1e12, "Tflop/s")

    def _decode_figures(self, batch: int) -> list[Figure]:
        rounds, machine = self._rounds(f"Decode, batch {batch}", lambda: self._decode_round(batch, _STEPS))
        context = median(mean_context(DECODE_PROMPT, found.decoder) for found in rounds)
        limits = {
            half: batch / decode_step_seconds(cost, machine, batch, context)
            for half, cost in self._costs.items()
            if cost is not None
        }
        return decode_figures(batch, rounds, limits)

    def _decode_round(self, batch: int, steps: int) -> DecodeRound:
        engines = self._engines
        ours = []
        plain = []
        for engine in (engines.decoder, engines.full):
            time.sleep(_PAUSE)
            ours.append(engine.decode(self._prompts([DECODE_PROMPT] * batch), self._max_answer, steps))
        for peer, own in zip((engines.plain_decoder, engines.plain_full), ours, strict=True):
            # Under our workers, sequences decode while other prompts wait for the prefill worker. Plain vLLM starts all
            # of them at nearly the same time. Longer prompts give its sequences the same contexts.
            lengths = [DECODE_PROMPT + before for before in own.before]
            time.sleep(_PAUSE)
            plain.append(peer.decode(self._prompts(lengths), self._max_answer, steps))
        return DecodeRound(*ours, *plain)

    def _prompt_figures(self, asked: int, length: int) -> list[Figure]:
        rounds, machine = self._rounds(f"Prompts of {length} tokens", lambda: self._prompt_round(length))
        cost = self._costs["full"]
        limit = None if cost is None else prefill_seconds(cost, machine, [length])
        return prompt_figures(length, asked, rounds, limit)

    def _prompt_round(self, length: int) -> PromptRound:
        (prompt,) = self._prompts([length])
        time.sleep(_PAUSE)
        times, cpu, answer = self._engines.decoder.answer(prompt, ANSWER)
        timing = answer.timing
        if len(times) < 2 or timing.prefill_compute is None or timing.handoff_exposed is None:
            raise InternalError("the answer has no second token, or no timing for prefill compute or exposed handoff")
        time.sleep(_PAUSE)
        plain_times, plain_cpu = self._engines.plain_full.answer(prompt, 1)
        time.sleep(_PAUSE)
        steps, _ = self._engines.plain_decoder.answer(prompt, ANSWER)
        return PromptRound(
            ttft=times[0],
            cpu=cpu,
            prefill=timing.prefill_compute,
            exposed=timing.handoff_exposed,
            second=times[1] - times[0],
            plain_ttft=plain_times[0],
            plain_cpu=plain_cpu,
            plain_step=median(b - a for a, b in pairwise(steps)),
        )

    def _rounds(self, step: str, turn: Callable[[], _T]) -> tuple[list[_T], Machine]:
        """Runs ``turn`` once per round. Returns what it returned, and the machine's speed in these rounds."""
        found, machines = [], []
        for done in range(self._plan.rounds):
            self._report(step, done, self._plan.rounds)
            time.sleep(_PAUSE)
            machines.append(self._probe.measure())
            found.append(turn())
        self._report(step, self._plan.rounds, self._plan.rounds)
        self._machines += machines
        return found, median_machine(machines)

    def _prompts(self, lengths: Sequence[int]) -> list[list[int]]:
        """Random prompts, of which no two share a prefix."""
        vocab = self._pair.full_config.vocab_size
        return [[self._rng.randrange(vocab) for _ in range(length)] for length in lengths]

    @property
    def _max_answer(self) -> int:
        return min(MAX_ANSWER, self._settings.max_model_len - DECODE_PROMPT)


def model_cost(config: ModelConfig, dtype: DTypeName) -> ModelCost | None:
    """What a model costs in vLLM, which has the whole head. None for quantised weights, whose bytes are not known."""
    if config.weight_format != "plain":
        return None
    whole = replace(config, head_tokens=config.vocab_size, tail_rank=0, head_mask=b"")
    spec = config.kv_spec(dtype)
    cost = ModelCost.of(whole, 0, spec.token_bytes)
    parameters = (cost.layer_flops + cost.head_flops) // 2  # a token multiplies and adds once with every weight
    return replace(cost, weight_bytes=parameters * DTYPE_BYTES[dtype])

"""Measures both stages on vLLM beside plain vLLM: the decoder and the full model, under our workers and alone."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from itertools import pairwise
from operator import truediv
from pathlib import Path
from statistics import median
from typing import NamedTuple

from overfill.errors import InternalError
from overfill.lab.bench.vllm.engines import EngineRounds, PlainEngine, StackEngine, VllmSettings, stack_engines
from overfill.lab.measurement import Measurement
from overfill.lab.stacks import Log
from overfill.making.identity_pair import identity_pair
from overfill.model.manifest import Pair
from overfill.telemetry.progress import Report

DECODE_PROMPT = 128
"""Tokens of each prompt of a decode turn."""

MAX_ANSWER = 1024
"""Maximum tokens of a sequence in a decode turn."""

ANSWER = 8
"""Tokens of an answer to a measured prompt."""

MIN_DECODE = {32: 0.95}
"""Batch -> lower limit of the decoder's rate under our worker, as a multiple of plain vLLM's."""

MIN_GAIN = 0.95
"""Lower limit of the decoder's gain under our workers, as a multiple of its gain in plain vLLM."""

MAX_TTFT = {512: 1.15, 2048: 1.10, 8192: 1.05}
"""Prompt length that was asked for -> upper limit of the time to first token, as a multiple of a plain prefill."""

MAX_EXPOSED = {2048: 0.05}
"""Prompt length -> upper limit of the second token's wait for KV, as a share of the prefill."""

_PEER = "plain vLLM"

DecodeRound = tuple[float, ...]
"""Tokens per second of the decoder under our worker and in plain vLLM, and of the full model under both."""


@dataclass(frozen=True, slots=True)
class StagesPlan:
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
        """Tokens for which a KV cache needs memory: those that it has at most, and an eighth more."""
        rows = max(self.batches) * min(context, DECODE_PROMPT + MAX_ANSWER)
        return max(rows, self.max_model_len(context)) * 9 // 8


class PromptRound(NamedTuple):
    """One request to the stack, and the same prompt in plain vLLM. Times are in milliseconds.

    Attributes:
        ttft: Time to first token, measured by the client.
        exposed: Time from the first token's arrival to the first decode step, as a share of the prefill's compute.
        second: Time from first to second token, measured by the client.
        plain_ttft: Time to first token of the full model in plain vLLM.
        plain_step: A decode step of the decoder in plain vLLM, after as long a prompt.
    """

    ttft: float
    exposed: float
    second: float
    plain_ttft: float
    plain_step: float


def measure_stages(
    pair: Pair, plan: StagesPlan, settings: VllmSettings, report: Report, log: Log
) -> Iterator[Measurement]:
    """Yields each figure when it is known.

    Raises:
        StartFailed, PeerFailed: an engine did not start.
    """
    context = pair.full_config.max_positions
    with ExitStack() as stack:
        logs = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="overfill-bench-")))
        folders = {"decoder": pair.folder, "full": stack.enter_context(identity_pair(pair.full_path, report=report))}
        report("Starting engines", 0, 3)
        ours = stack.enter_context(stack_engines(folders, settings, log))
        plain: dict[str, PlainEngine] = {}
        for half, model in (("decoder", pair.decoder_path), ("full", pair.full_path)):
            report("Starting engines", 1 + len(plain), 3)
            engine = PlainEngine(f"{_PEER} of the {half}", model, settings, logs / half)
            plain[half] = stack.enter_context(closing(engine))
        report("Starting engines", 3, 3)
        max_answer = min(MAX_ANSWER, settings.max_model_len - DECODE_PROMPT)
        turns = EngineRounds(plan.rounds, pair.full_config.vocab_size, report)

        def decode_round(batch: int) -> DecodeRound:
            turn = (turns.decode(batch, DECODE_PROMPT, max_answer, ours[half], plain[half]) for half in plain)
            return tuple(window.rate for windows in turn for window in windows)

        lengths = plan.lengths(context)
        report("Warming up", 0, 1)
        decode_round(max(plan.batches))
        _prompt_round(min(lengths.values()), turns, ours["decoder"], plain)
        report("Warming up", 1, 1)
        for batch in plan.batches:
            yield from decode_figures(batch, [decode_round(batch) for _ in turns.rounds(f"Decode, batch {batch}")])
        for asked, length in lengths.items():
            rounds = turns.rounds(f"Prompts of {length} tokens")
            found = [_prompt_round(length, turns, ours["decoder"], plain) for _ in rounds]
            yield from prompt_figures(length, asked, found)


def _prompt_round(length: int, turns: EngineRounds, ours: StackEngine, plain: Mapping[str, PlainEngine]) -> PromptRound:
    ((prompt,), (same_length,)) = turns.prompts(1, length), turns.prompts(1, length)
    times, answer = ours.answer(prompt, ANSWER)
    timing = answer.timing
    if len(times) < 2 or timing.prefill_compute is None or timing.handoff_exposed is None:
        raise InternalError("the answer has no second token, or no timing for prefill compute or exposed handoff")
    (plain_ttft,) = plain["full"].answer(prompt, 1)
    steps = plain["decoder"].answer(same_length, ANSWER)
    return PromptRound(
        ttft=1e3 * times[0],
        exposed=timing.handoff_exposed / timing.prefill_compute,
        second=1e3 * (times[1] - times[0]),
        plain_ttft=1e3 * plain_ttft,
        plain_step=1e3 * median(after - before for before, after in pairwise(steps)),
    )


def decode_figures(batch: int, rounds: Sequence[DecodeRound]) -> list[Measurement]:
    """Figures of one batch."""
    decoder, plain_decoder, full, plain_full = zip(*rounds, strict=True)
    gain, plain_gain = (list(map(truediv, *halves)) for halves in ((decoder, full), (plain_decoder, plain_full)))
    return [
        Measurement.beside(name, values, unit, _PEER, peers, limit, at_least=True)
        for name, values, unit, peers, limit in (
            (f"decode_decoder_{batch}", decoder, "tokens/s", plain_decoder, MIN_DECODE.get(batch)),
            (f"decode_full_{batch}", full, "tokens/s", plain_full, None),
            (f"decode_gain_{batch}", gain, "of the full model", plain_gain, MIN_GAIN),
        )
    ]


def prompt_figures(length: int, asked: int, rounds: Sequence[PromptRound]) -> list[Measurement]:
    """Figures of one prompt length.

    Args:
        asked: The length that the user gave; ``length`` is shorter where the model's context is.
    """
    ttft, exposed, second, plain_ttft, plain_step = zip(*rounds, strict=True)
    return [
        Measurement.beside(f"ttft_{length}", ttft, "ms", _PEER, plain_ttft, MAX_TTFT.get(asked)),
        Measurement.median(f"handoff_exposed_{length}", exposed, "of the prefill", MAX_EXPOSED.get(asked)),
        Measurement.beside(f"second_token_{length}", second, "ms", "plain decode step", plain_step),
    ]

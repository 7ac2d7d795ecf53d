"""Turns the rounds of a run into figures with their aims. Arithmetic, JSON and table; measures nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, median

from rich.table import Table

from overfill.lab.measurement import Measurement, measurements_table
from overfill.lab.bench.vllm.window import DecodeWindow

MAX_GAIN_DIFFERENCE = 0.05
"""Upper limit of the relative difference between the decoder's gain under our workers and in plain vLLM."""

MIN_DECODE_RATIO = {32: 0.95}
"""Batch -> lower limit of the decoder's rate under our worker, as a multiple of plain vLLM's."""

MAX_TTFT_RATIO = {512: 1.15, 2048: 1.10, 8192: 1.05}
"""Prompt length that was asked for -> upper limit of the time to first token, as a multiple of a plain prefill."""

MAX_EXPOSED_SHARE = {2048: 0.05}
"""Prompt length -> upper limit of the second token's wait for KV, as a share of the prefill."""


@dataclass(frozen=True, slots=True)
class Figure(Measurement):
    """A measurement with what this machine allows and with CPU time.

    Attributes:
        limit: Best value that the machine's memory bandwidth and matrix rate allow.
        cpu_ms, peer_cpu_ms: CPU milliseconds of the process that computed it, per token or per prompt.
    """

    limit: float | None = None
    cpu_ms: float | None = None
    peer_cpu_ms: float | None = None


@dataclass(frozen=True, slots=True)
class DecodeRound:
    """One turn of each engine at one batch."""

    decoder: DecodeWindow
    full: DecodeWindow
    plain_decoder: DecodeWindow
    plain_full: DecodeWindow

    @property
    def gain(self) -> float:
        """Rate of the decoder divided by the full model's, under our workers."""
        return self.decoder.rate / self.full.rate

    @property
    def plain_gain(self) -> float:
        return self.plain_decoder.rate / self.plain_full.rate


@dataclass(frozen=True, slots=True)
class PromptRound:
    """One request to the stack, and the same prompt in plain vLLM. Times are in seconds.

    Attributes:
        ttft: Time to first token, measured by the client.
        cpu: CPU time of the prefill worker.
        prefill: Compute of the prefill worker, as the answer reports it.
        exposed: Time from the first token's arrival to the start of the first decode step.
        second: Time from first to second token, measured by the client.
        plain_ttft, plain_cpu: The same of the full model in plain vLLM.
        plain_step: A decode step of the decoder in plain vLLM, after as long a prompt.
    """

    ttft: float
    cpu: float
    prefill: float
    exposed: float
    second: float
    plain_ttft: float
    plain_cpu: float
    plain_step: float


def decode_figures(batch: int, rounds: Sequence[DecodeRound], limits: Mapping[str, float]) -> list[Figure]:
    """Figures of one batch.

    Args:
        limits: Highest tokens per second that this machine allows the ``decoder`` and the ``full`` model; may be empty.
    """
    halves = {
        "decoder": ([r.decoder for r in rounds], [r.plain_decoder for r in rounds]),
        "full": ([r.full for r in rounds], [r.plain_full for r in rounds]),
    }
    figures = [
        Figure.median(
            f"decode_{half}_{batch}",
            [w.rate for w in ours],
            "tokens/s",
            peer="plain vLLM",
            peer_value=median(w.rate for w in plain),
            limit=limits.get(half),
            cpu_ms=median(w.cpu_ms for w in ours),
            peer_cpu_ms=median(w.cpu_ms for w in plain),
        )
        for half, (ours, plain) in halves.items()
    ]
    difference = [abs(r.gain / r.plain_gain - 1) for r in rounds]
    ratios = [r.decoder.rate / r.plain_decoder.rate for r in rounds]
    return [
        *figures,
        Figure.median(
            f"decode_gain_{batch}",
            [r.gain for r in rounds],
            "of the full model",
            peer="plain vLLM",
            peer_value=median(r.plain_gain for r in rounds),
        ),
        Figure.median(f"decode_gain_difference_{batch}", difference, "of plain vLLM's", MAX_GAIN_DIFFERENCE),
        Figure.median(f"decode_ratio_{batch}", ratios, "of plain vLLM", MIN_DECODE_RATIO.get(batch), at_least=True),
    ]


def prompt_figures(length: int, asked: int, rounds: Sequence[PromptRound], limit: float | None) -> list[Figure]:
    """Figures of one prompt length.

    Args:
        asked: The length that the user gave; ``length`` is shorter where the model's context is.
        limit: Minimum seconds of a prefill on this machine; None means unknown.
    """
    return [
        Figure.median(
            f"ttft_{length}",
            [1e3 * r.ttft for r in rounds],
            "ms",
            peer="plain vLLM",
            peer_value=1e3 * median(r.plain_ttft for r in rounds),
            limit=None if limit is None else 1e3 * limit,
            cpu_ms=1e3 * median(r.cpu for r in rounds),
            peer_cpu_ms=1e3 * median(r.plain_cpu for r in rounds),
        ),
        Figure.median(
            f"ttft_ratio_{length}", [r.ttft / r.plain_ttft for r in rounds], "of plain vLLM", MAX_TTFT_RATIO.get(asked)
        ),
        Figure.median(
            f"handoff_exposed_{length}",
            [r.exposed / r.prefill for r in rounds],
            "of the prefill",
            MAX_EXPOSED_SHARE.get(asked),
        ),
        Figure.median(
            f"second_token_{length}",
            [1e3 * r.second for r in rounds],
            "ms",
            peer="plain decode step",
            peer_value=1e3 * median(r.plain_step for r in rounds),
        ),
    ]


def mean_context(prompt: int, window: DecodeWindow) -> float:
    """Mean tokens of a sequence in the middle of a window, after prompts of ``prompt`` tokens."""
    return prompt + mean(window.before) + window.tokens / len(window.before) / 2


def figures_table(figures: Sequence[Figure]) -> Table:
    """A table with a line per figure."""
    return measurements_table(figures, {"limit": "limit", "CPU ms": "cpu_ms", "peer's CPU ms": "peer_cpu_ms"})

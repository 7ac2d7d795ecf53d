"""The part of ``overfill demo`` about tiers: asks one question in each, and shows the answers side by side."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from overfill.cli.output import sources, tokens_per_second
from overfill.client import Answer, Client, Message, SamplingParams
from overfill.settings.tiers import TierSpec

if TYPE_CHECKING:
    from overfill.kv.spec import KvCacheDtype, Quantization
    from overfill.model.manifest import Pair
    from overfill.rpc.stack_status import WorkerStatus

TIERS = (TierSpec(name="full", pair="identity"), TierSpec(name="default", pair="default"))
"""The tiers of the demonstration: the full model, and the pair whose answers a person can read."""

_INT8 = {"quantize": "int8", "kv_cache_dtype": "int8"}

_MIN_COLUMN = 30  # characters of an answer beside others; narrower terminals show one below the other


@dataclass(frozen=True, slots=True)
class TierAnswer:
    """The answer of one tier, and what it cost.

    Attributes:
        precision: format of the decoder's weights and of the worker's KV, such as "int8", or "int8, bfloat16" if they
            differ.
        weight_bytes: bytes of the decoder's weights that each token reads.
        kv_bytes: bytes of KV that each token reads, on average.
    """

    tier: str
    answer: Answer
    precision: str
    weight_bytes: int
    kv_bytes: int

    def to_json(self) -> dict[str, Any]:
        return {
            "tier": self.tier,
            "tokens_per_second": tokens_per_second(self.answer),
            "precision": self.precision,
            "weight_bytes_per_token": self.weight_bytes,
            "kv_bytes_per_token": self.kv_bytes,
            "answer": dataclasses.asdict(self.answer),
        }


def default_tiers() -> tuple[TierSpec, ...]:
    """Returns ``TIERS``. On a CPU with native kernels, the pair ``default`` has int8 weights and KV.

    There, int8 about doubles the speed of a decoder and changes few of its tokens. The full model stays exact.
    """
    from overfill.engine.device import resolve_device
    from overfill.model.native.library import unavailable_reason

    if resolve_device("auto").type != "cpu" or unavailable_reason() is not None:
        return TIERS
    full, default = TIERS
    return (full, default.model_copy(update={"settings": _INT8}))


def ask_tiers(
    client: Client,
    pairs: Mapping[str, Pair],
    question: str,
    sampling: SamplingParams,
    show: Callable[[str, str], None],
) -> list[TierAnswer]:
    """Asks the question in each tier, one after the other, so that the tiers do not share the cores.

    Args:
        pairs: tier -> its pair.
        show: gets the tier and the answer's text so far.
    """
    workers = {worker.tier: worker for worker in client.status().workers}
    answers = []
    for tier, pair in pairs.items():
        text = ""
        show(tier, text)
        with client.stream([Message("user", question)], sampling=sampling, tier=tier) as stream:
            for delta in stream:
                text += delta.text
                show(tier, text)
        answers.append(TierAnswer(tier, stream.answer, *_costs(pair, workers[tier], stream.answer)))
    return answers


def answers_view(texts: Mapping[str, str], width: int) -> RenderableType:
    """Returns the answers side by side, or one below the other if ``width`` characters are too few for that."""
    if width < _MIN_COLUMN * len(texts):
        below = [(Text(tier, style="bold"), Padding(Text(text), (0, 0, 1, 0))) for tier, text in texts.items()]
        return Group(*(part for pair in below for part in pair))
    table = Table(box=None, padding=(0, 2, 0, 0), expand=True)
    for tier in texts:
        table.add_column(tier, ratio=1, header_style="bold")
    table.add_row(*map(Text, texts.values()))
    return table


def figures_table(answers: Sequence[TierAnswer]) -> Table:
    """Returns a table with a line per tier."""
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("tier")
    table.add_column("weights, KV")
    for column in ("tokens/s", "MB per token", "prompt cached"):
        table.add_column(column, justify="right")
    for one in answers:
        rate, usage = tokens_per_second(one.answer), one.answer.usage
        table.add_row(
            one.tier,
            one.precision,
            "?" if rate is None else f"{rate:.1f}",
            f"{(one.weight_bytes + one.kv_bytes) / 1e6:.0f}",
            f"{usage.cached_tokens} of {usage.prompt_tokens}{sources(usage)}",
        )
    return table


def _costs(pair: Pair, worker: WorkerStatus, answer: Answer) -> tuple[str, int, int]:
    """Returns the precision, and the bytes of weights and of KV (on average) that one token of ``answer`` reads."""
    from overfill.making.evaluate.costs import kv_token_bytes, weight_bytes

    process = worker.process
    assert process is not None
    assert process.kv is not None
    assert process.model is not None
    dtype, config = process.kv.dtype, pair.decoder_config
    cached = answer.usage.prompt_tokens + answer.usage.completion_tokens // 2
    quantize: Quantization = "int8" if process.model.decoder_quantize == "int8" else "none"
    cache: KvCacheDtype = "int8" if process.model.kv_cache_dtype == "int8" else "auto"
    precision = ", ".join(
        dict.fromkeys([process.model.decoder_quantize or dtype, process.model.kv_cache_dtype or dtype])
    )
    return precision, weight_bytes(config, quantize, dtype), cached * kv_token_bytes(config, dtype, cache)

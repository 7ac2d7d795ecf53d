"""Judges an adapter on conversations of its task: on the full model's KV, with its own prefill, and without it.

On the full model's KV is how a stack serves it. With its own prefill is how PEFT alone does, and most adapters were
trained. The decoder without the adapter shows what the adapter adds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from overfill.api.tokenizer import Tokenizer
from overfill.engine.device import native_dtype, resolve_device
from overfill.kv.spec import DTypeName
from overfill.making.conversations import Transcript
from overfill.making.evaluate.evaluation import check_lengths, load_model, longest_sequence
from overfill.making.evaluate.forward import BatchModel, batches, cache_tokens, target_tokens
from overfill.making.evaluate.free_running import answer_limit
from overfill.making.evaluate.greedy_answers import Written, write_answers
from overfill.making.evaluate.teacher_forced import Candidate, scorable
from overfill.making.evaluate.token_metrics import Estimate, Metric, MetricAccumulator
from overfill.model.adapter import LoraAdapter
from overfill.model.pair_files import load_whole
from overfill.telemetry.progress import Report, silent

AdapterVariant = Literal["full_kv", "own_prefill", "without"]
ADAPTER_TITLES: dict[AdapterVariant, str] = {
    "full_kv": "on the full model's KV",
    "own_prefill": "with its own prefill",
    "without": "decoder without it",
}

_SLOT = 0


@dataclass(frozen=True, slots=True)
class TaskFigures:
    """Figures of one variant.

    Attributes:
        nll: negative log likelihood of the given answers' tokens, in nats.
        first: share of these tokens that the variant finds most likely.
        right: share of the variant's own greedy answers whose text is the given one; None if it wrote none.
    """

    nll: Metric
    first: Metric
    right: Estimate | None

    @property
    def perplexity(self) -> float:
        return math.exp(self.nll.overall.mean)

    def to_json(self) -> dict[str, Any]:
        right = None if self.right is None else self.right.to_json()
        return {"nll": self.nll.to_json(), "first": self.first.to_json(), "right": right}


@dataclass(frozen=True, slots=True)
class AdapterEvaluation:
    """Quality of an adapter on ``transcripts`` answers of the set ``data``."""

    pair: str
    adapter: str
    data: str
    dtype: DTypeName
    device: str
    transcripts: int
    max_tokens: int
    figures: Mapping[AdapterVariant, TaskFigures]

    def to_json(self) -> dict[str, Any]:
        """Returns all figures as plain values."""
        figures = {variant: figures.to_json() for variant, figures in self.figures.items()}
        names = ("pair", "adapter", "data", "dtype", "device", "transcripts", "max_tokens")
        return {name: getattr(self, name) for name in names} | {"figures": figures}


def evaluate_adapter(
    pair_folder: Path,
    adapter: LoraAdapter,
    transcripts: Sequence[Transcript],
    *,
    data: str = "",
    free_running: bool = True,
    max_tokens: int | None = None,
    dtype: DTypeName | None = None,
    device: str = "auto",
    threads: int | None = None,
    report: Report = silent,
) -> AdapterEvaluation:
    """Judges an adapter of the decoder of the pair in ``pair_folder``.

    Args:
        transcripts: with the adapter's tail (``Transcript.tail``).
        free_running: also let the variants write answers to the prompts.
        data, max_tokens, dtype, device, threads: as for ``evaluate``, which has the errors too.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    where = resolve_device(device)
    dtype = dtype or native_dtype(where)
    kept = scorable(transcripts)
    pair = load_whole(pair_folder, digests=True, report=report)
    check_lengths(pair, kept)
    max_tokens = max_tokens or answer_limit(kept)
    longest = longest_sequence(kept, max_tokens)
    full = load_model(pair, "full", dtype, where, longest)
    model = load_model(pair, "decoder", dtype, where, longest)
    model.new_adapter_slots(1, adapter.record.rank).stage(_SLOT, adapter)

    nll, first = ({v: MetricAccumulator() for v in ADAPTER_TITLES} for _ in range(2))
    reader, half = BatchModel(full, cache_tokens(kept)), BatchModel(model, cache_tokens(kept))
    done = 0
    for batch in batches(kept):
        reader.read_all(batch, 0)
        targets = target_tokens(batch, 0).to(where)
        logits = {
            "full_kv": half.read_answers(batch, reader, pair.layer_map, adapter=_SLOT),
            "without": half.read_answers(batch, reader, pair.layer_map),
            "own_prefill": half.read_all(batch, 0, _SLOT),
        }
        for variant in ADAPTER_TITLES:
            losses = torch.nn.functional.cross_entropy(logits[variant], targets, reduction="none")
            hits = (logits[variant].argmax(-1) == targets).float()
            for accumulator, values in ((nll[variant], losses), (first[variant], hits)):
                for transcript, own in zip(batch, values.split([len(t.answer) for t in batch]), strict=True):
                    accumulator.add(own, 0, transcript.kind)
        done += len(batch)
        report("Reading given answers", done, len(kept))

    right: dict[AdapterVariant, Estimate] = {}
    if free_running:
        tokenizer = Tokenizer.load(pair.full_path)
        # Of each prompt in turn, so that the full model reads it once.
        written = write_answers(
            full,
            Candidate(model, pair.layer_map),
            [t.prompt for t in kept for _ in ADAPTER_TITLES],
            max_tokens,
            starts=[0 if variant == "own_prefill" else t.decoder_start for t in kept for variant in ADAPTER_TITLES],
            adapters=[None if variant == "without" else _SLOT for _ in kept for variant in ADAPTER_TITLES],
            report=report,
        )
        for index, variant in enumerate(ADAPTER_TITLES):
            right[variant] = _right(tokenizer, kept, written[index :: len(ADAPTER_TITLES)])
    return AdapterEvaluation(
        pair=pair.name,
        adapter=adapter.record.name,
        data=data,
        dtype=dtype,
        device=where.type,
        transcripts=len(kept),
        max_tokens=max_tokens,
        figures={v: TaskFigures(nll[v].metric(), first[v].metric(), right.get(v)) for v in ADAPTER_TITLES},
    )


def _right(tokenizer: Tokenizer, transcripts: Sequence[Transcript], written: Sequence[Written]) -> Estimate:
    found = MetricAccumulator()
    for transcript, answer in zip(transcripts, written, strict=True):
        found.add([float(is_right(tokenizer, transcript, answer))], 0)
    return found.metric().overall


def is_right(tokenizer: Tokenizer, transcript: Transcript, written: Written) -> bool:
    """Returns whether the text of an answer is the given one."""
    return tokenizer.decode(written.token_ids) == tokenizer.decode(transcript.answer)


def adapter_rows(evaluation: AdapterEvaluation) -> list[list[str]]:
    """Returns a header and one row per variant."""
    rows = [[f"{evaluation.adapter}, {evaluation.transcripts} answers", "perplexity", "first tokens", "right answers"]]
    for variant, figures in evaluation.figures.items():
        right = "" if figures.right is None else _share(figures.right)
        rows.append([ADAPTER_TITLES[variant], f"{figures.perplexity:.3f}", _share(figures.first.overall), right])
    return rows


def _share(estimate: Estimate) -> str:
    return f"{100 * estimate.mean:.1f} ± {100 * estimate.standard_error:.1f} %"

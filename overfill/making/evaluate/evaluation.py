"""Judge a pair on held-out conversations, in five variants.

They are the full model; both halves together, with the prompt's KV as it is, in int8 on its way, and in an int8 cache;
and the decoder alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from overfill.api.tokenizer import Tokenizer
from overfill.engine.build import load_half
from overfill.engine.device import native_dtype, resolve_device
from overfill.engine.protocol import EngineOptions
from overfill.errors import InvalidRequest
from overfill.kv.spec import DTypeName
from overfill.making.conversations import Transcript
from overfill.making.evaluate.costs import DecodeCost
from overfill.making.evaluate.forward import cache_tokens
from overfill.making.evaluate.free_running import FreeRunning, answer_limit, judge_free_running
from overfill.making.evaluate.teacher_forced import Candidate, Form, TeacherForced, scorable, teacher_forced
from overfill.making.evaluate.token_metrics import Estimate, finite_or_none
from overfill.model.manifest import Half, Pair
from overfill.model.pair_files import load_whole
from overfill.model.transformer import ForwardModel
from overfill.telemetry.progress import Report, silent

Variant = Literal["full"] | Form
TITLES: dict[Variant, str] = {
    "full": "full model",
    "two_stage": "two-stage",
    "two_stage_int8": "two-stage, int8 KV",
    "two_stage_int8_cache": "two-stage, int8 KV cache",
    "decoder_alone": "decoder alone",
}


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Quality and decode cost of a pair.

    Attributes:
        pair: Name of the pair.
        data: Name of the judged set.
        dtype, device: Type and device of the computation.
        transcripts: The judged transcripts.
        overlap: Indices of the judged conversations that overlap with text that the decoder was made from
            (``TextDigests``). None if that is not known.
        max_tokens: Maximum length of a free-running answer.
        full, decoder: Cost of one decode step; the full model's is that of bf16.
        teacher_forced, free_running: Figures by variant. ``free_running`` is empty if it was not requested.
    """

    pair: str
    data: str
    recipe: Mapping[str, Any]
    dtype: DTypeName
    device: str
    transcripts: Sequence[Transcript]
    overlap: Sequence[int] | None
    max_tokens: int
    full: DecodeCost
    decoder: DecodeCost
    teacher_forced: Mapping[Variant, TeacherForced]
    free_running: Mapping[Variant, FreeRunning]

    @property
    def kinds(self) -> Mapping[str, int]:
        """Kind of conversation and number of transcripts; empty if the set has no kinds."""
        return Counter(t.kind for t in self.transcripts if t.kind)

    def to_json(self) -> dict[str, Any]:
        """Returns all figures as plain values."""
        full = self.free_running.get("full")
        return {
            "pair": self.pair,
            "data": self.data,
            "recipe": dict(self.recipe),
            "dtype": self.dtype,
            "device": self.device,
            "transcripts": len(self.transcripts),
            "kinds": dict(self.kinds),
            "overlap": None if self.overlap is None else list(self.overlap),
            "max_tokens": self.max_tokens,
            "full": asdict(self.full),
            "decoder": asdict(self.decoder),
            "teacher_forced": {name: figures.to_json() for name, figures in self.teacher_forced.items()},
            "free_running": {
                name: figures.to_json(full) for name, figures in self.free_running.items() if full is not None
            },
            "answers": [
                {
                    "question": transcript.question,
                    "kind": transcript.kind,
                    **{name: figures.answers[i].to_json() for name, figures in self.free_running.items()},
                }
                for i, transcript in enumerate(self.transcripts)
                if self.free_running
            ],
        }

    def summary(self) -> dict[str, Any]:
        """Returns the main figures by variant, for ``pair.json``."""
        figures: dict[str, Any] = {"data": self.data, "dtype": self.dtype, "transcripts": len(self.transcripts)}
        figures["overlapping"] = None if self.overlap is None else len(self.overlap)
        for name, forced in self.teacher_forced.items():
            values = {"nll": forced.nll, "kl": forced.kl, "agreement": forced.agreement}
            figures[name] = {key: round(metric.overall.mean, 4) for key, metric in values.items()}
            if name in self.free_running:
                free = self.free_running[name].beside(self.free_running["full"])
                for key in ("perplexity", "repeated", "tokens"):
                    figures[name][key] = finite_or_none(round(getattr(free, key), 4))
        figures["tokens"] = self.teacher_forced["full"].nll.overall.count
        return figures


def evaluate(
    pair_folder: Path,
    transcripts: Sequence[Transcript],
    *,
    data: str = "",
    overlap: Sequence[int] | None = None,
    free_running: bool = True,
    max_tokens: int | None = None,
    dtype: DTypeName | None = None,
    device: str = "auto",
    threads: int | None = None,
    report: Report = silent,
) -> Evaluation:
    """Judges the pair in ``pair_folder`` on ``transcripts``; leaves out answers of fewer than two tokens.

    Args:
        data: Name of the judged set.
        overlap: As in ``Evaluation``: the transcripts that are left out do not count.
        free_running: Also let the full model and the pair write answers to the prompts.
        max_tokens: Maximum length of such an answer. None means ``answer_limit``.
        dtype: Type of weights and activations. None means the device's native type.
        threads: Number of CPU threads. None keeps torch's setting.

    Raises:
        InvalidRequest: there is no answer to judge, or a transcript exceeds the pair's context.
        InvalidPair: as ``load_whole``.
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
    decoder = load_model(pair, "decoder", dtype, where, longest)
    candidate = Candidate(decoder, pair.layer_map)
    tokenizer = Tokenizer.load(pair.full_path)
    writers: dict[Variant, Candidate] = {}
    if free_running:
        writers = {"full": Candidate(full, range(pair.full_config.num_layers)), "two_stage": candidate}
    forms: tuple[Form, ...] = get_args(Form)
    written: dict[Variant, FreeRunning] = {}
    full_figures, figures = teacher_forced(full, candidate, kept, forms, report=report)
    for name, writer in writers.items():
        title = TITLES[name]
        written[name] = judge_free_running(full, tokenizer, writer, kept, max_tokens, title=title, report=report)
    return Evaluation(
        pair=pair.name,
        data=data,
        recipe=pair.recipe,
        dtype=dtype,
        device=where.type,
        transcripts=kept,
        overlap=overlap,
        max_tokens=max_tokens,
        full=DecodeCost.of(pair.full_config, "bf16"),
        decoder=DecodeCost.of(pair.decoder_config, "int8" if pair.quantize == "int8" else "bf16"),
        teacher_forced={"full": full_figures, **{form: figures[form] for form in forms}},
        free_running=written,
    )


def two_stage_agreement(pair: Pair, transcripts: Sequence[Transcript], *, report: Report = silent) -> Estimate:
    """Returns the share of answer tokens on which both stages together agree with the full model, as served.

    Raises:
        InvalidRequest: there is no answer to judge, or a transcript exceeds the pair's context.
    """
    kept = scorable(transcripts)
    check_lengths(pair, kept)
    where = resolve_device("auto")
    dtype, longest = native_dtype(where), cache_tokens(kept)
    full, decoder = (load_model(pair, half, dtype, where, longest) for half in ("full", "decoder"))
    _, figures = teacher_forced(full, Candidate(decoder, pair.layer_map), kept, step="Judging", report=report)
    return figures["two_stage"].agreement.overall


def check_lengths(pair: Pair, transcripts: Sequence[Transcript]) -> None:
    """Raises InvalidRequest if a transcript exceeds the pair's context."""
    context = min(pair.full_config.max_positions, pair.decoder_config.max_positions)
    longest = max(len(t.token_ids) for t in transcripts)
    if longest > context:
        raise InvalidRequest("data", f"holds a conversation of {longest} tokens; the pair's context is {context}")


def longest_sequence(transcripts: Sequence[Transcript], max_tokens: int) -> int:
    """Returns the number of positions for reading batches of ``transcripts`` and for answers of ``max_tokens``."""
    return max(cache_tokens(transcripts), *(t.answer_start + max_tokens for t in transcripts))


def load_model(pair: Pair, half: Half, dtype: DTypeName, device: torch.device, longest: int) -> ForwardModel:
    """Loads one half as the services do, for sequences of up to ``longest`` tokens or its context."""
    longest = min(longest, pair.config(half).max_positions)
    options = EngineOptions(
        device, dtype, block_size=1, max_model_len=longest, max_num_seqs=1, max_num_batched_tokens=1
    )
    return load_half(pair, half, options).model

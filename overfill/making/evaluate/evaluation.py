"""Judge a pair on held-out conversations: the full model, both halves together, and the decoder alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from overfill.engine.build import load_half
from overfill.engine.device import native_dtype, resolve_device
from overfill.engine.protocol import EngineOptions
from overfill.errors import InvalidRequest
from overfill.kv.spec import DTypeName
from overfill.making.conversations import Transcript
from overfill.making.evaluate.costs import DecodeCost
from overfill.making.evaluate.forward import cache_tokens
from overfill.making.evaluate.free_running import MAX_TOKENS, FreeRunning, judge_answers, write_answers
from overfill.making.evaluate.teacher_forced import Candidate, TeacherForced, scorable, teacher_forced
from overfill.making.evaluate.token_metrics import Estimate, finite_or_none
from overfill.making.identity_pair import identity_pair
from overfill.model.manifest import Half, Pair
from overfill.model.pair_files import load_whole
from overfill.model.transformer import ForwardModel
from overfill.pair.llm import Completion
from overfill.telemetry.progress import Report, silent

Variant = Literal["full", "two_stage", "two_stage_int8", "two_stage_int8_cache", "decoder_alone"]
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
        dtype, device: Type and device of the computation.
        transcripts: Number of judged transcripts.
        overlap: Indices of the judged conversations that overlap with text that the decoder was made from
            (``TextDigests``). None if that is not known.
        full, decoder: Cost of one decode step; the full model's is that of bf16.
        teacher_forced, free_running: Figures by variant. ``free_running`` is empty if it was not requested.
    """

    pair: str
    recipe: Mapping[str, Any]
    dtype: DTypeName
    device: str
    transcripts: int
    overlap: Sequence[int] | None
    full: DecodeCost
    decoder: DecodeCost
    teacher_forced: Mapping[Variant, TeacherForced]
    free_running: Mapping[Variant, FreeRunning]

    def to_json(self) -> dict[str, Any]:
        """Returns all figures as plain values."""
        return {
            "pair": self.pair,
            "recipe": dict(self.recipe),
            "dtype": self.dtype,
            "device": self.device,
            "transcripts": self.transcripts,
            "overlap": None if self.overlap is None else list(self.overlap),
            "full": asdict(self.full),
            "decoder": asdict(self.decoder),
            "teacher_forced": {name: figures.to_json() for name, figures in self.teacher_forced.items()},
            "free_running": {name: figures.to_json() for name, figures in self.free_running.items()},
        }

    def summary(self) -> dict[str, Any]:
        """Returns the main figures by variant, for ``pair.json``."""
        figures: dict[str, Any] = {"dtype": self.dtype, "transcripts": self.transcripts}
        figures["overlapping"] = None if self.overlap is None else len(self.overlap)
        for name, forced in self.teacher_forced.items():
            values = {"nll": forced.nll, "kl": forced.kl, "agreement": forced.agreement}
            figures[name] = {key: round(metric.overall.mean, 4) for key, metric in values.items()}
            if name in self.free_running:
                written = self.free_running[name]
                figures[name]["teacher_perplexity"] = finite_or_none(round(written.perplexity, 4))
                figures[name]["repeated_4grams"] = finite_or_none(round(written.repeated.overall.mean, 4))
        figures["tokens"] = self.teacher_forced["full"].nll.overall.count
        return figures


def evaluate(
    pair_folder: Path,
    transcripts: Sequence[Transcript],
    *,
    overlap: Sequence[int] | None = None,
    free_running: bool = True,
    max_tokens: int = MAX_TOKENS,
    dtype: DTypeName | None = None,
    device: str = "auto",
    threads: int | None = None,
    report: Report = silent,
) -> Evaluation:
    """Judges the pair in ``pair_folder`` on ``transcripts``; leaves out answers of fewer than two tokens.

    Args:
        overlap: Recorded in the result: as in ``Evaluation``.
        free_running: Also let each variant write its own answers to the prompts.
        max_tokens: Maximum length of such an answer.
        dtype: Type of weights and activations. None means the device's native type.
        threads: Number of CPU threads. None keeps torch's setting.

    Raises:
        InvalidRequest: there is no answer to judge, or a transcript exceeds the pair's context.
        InvalidPair: as ``load_whole``.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    pair = load_whole(pair_folder, digests=True, report=report)
    where = resolve_device(device)
    dtype = dtype or native_dtype(where)
    kept = scorable(transcripts)
    check_lengths(pair, kept)
    prompts = [t.prompt for t in kept]
    answers = _write_all(pair, prompts, max_tokens, dtype, device, report) if free_running else {}
    longest = max([cache_tokens(kept), *(len(p) + max_tokens for p in prompts)])
    full = load_model(pair, "full", dtype, where, longest)
    decoder = load_model(pair, "decoder", dtype, where, longest)
    candidates = {"decoder": Candidate(decoder, pair.layer_map)}
    full_figures, judged = teacher_forced(full, candidates, kept, kv_forms=("int8", "int8 cache"), report=report)
    figures = judged["decoder"]
    return Evaluation(
        pair=pair.name,
        recipe=pair.recipe,
        dtype=dtype,
        device=where.type,
        transcripts=len(kept),
        overlap=overlap,
        full=DecodeCost.of(pair.full_config, "bf16"),
        decoder=DecodeCost.of(pair.decoder_config, "int8" if pair.quantize == "int8" else "bf16"),
        teacher_forced={
            "full": full_figures,
            "two_stage": figures.two_stage,
            "two_stage_int8": figures.by_kv_form["int8"],
            "two_stage_int8_cache": figures.by_kv_form["int8 cache"],
            "decoder_alone": figures.alone,
        },
        free_running={
            name: judge_answers(full, prompts, written, step=f"Scoring: {TITLES[name]}", report=report)
            for name, written in answers.items()
        },
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
    candidates = {"decoder": Candidate(decoder, pair.layer_map)}
    _, judged = teacher_forced(full, candidates, kept, step="Judging", report=report)
    return judged["decoder"].two_stage.agreement.overall


def check_lengths(pair: Pair, transcripts: Sequence[Transcript]) -> None:
    """Raises InvalidRequest if a transcript exceeds the pair's context."""
    context = min(pair.full_config.max_positions, pair.decoder_config.max_positions)
    longest = max(len(t.token_ids) for t in transcripts)
    if longest > context:
        raise InvalidRequest("data", f"holds a conversation of {longest} tokens; the pair's context is {context}")


def load_model(pair: Pair, half: Half, dtype: DTypeName, device: torch.device, longest: int) -> ForwardModel:
    """Loads one half as the services do, for sequences of up to ``longest`` tokens or its context."""
    longest = min(longest, pair.config(half).max_positions)
    options = EngineOptions(
        device, dtype, block_size=1, max_model_len=longest, max_num_seqs=1, max_num_batched_tokens=1
    )
    return load_half(pair, half, options).model


def _write_all(
    pair: Pair,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    dtype: DTypeName,
    device: str,
    report: Report,
) -> dict[Variant, list[Completion]]:
    """Lets the full model, the pair and the decoder alone write answers, with one engine in memory at a time."""
    answers: dict[Variant, list[Completion]] = {}

    def write(name: Variant, folder: Path) -> None:
        step = f"Writing: {TITLES[name]}"
        answers[name] = write_answers(
            folder, prompts, max_tokens=max_tokens, dtype=dtype, device=device, step=step, report=report
        )

    with identity_pair(pair.full_path) as folder:
        write("full", folder)
    write("two_stage", pair.folder)
    with identity_pair(pair.decoder_path, pair.recipe) as folder:
        write("decoder_alone", folder)
    return answers

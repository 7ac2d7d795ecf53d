"""Judge how a decoder predicts given answers: likelihood, KL divergence from the full model, and agreement with it.

The full model always writes the first answer token, so that all figures are over the tokens after it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from overfill.errors import InvalidRequest
from overfill.making.conversations import Transcript
from overfill.making.evaluate.forward import BatchModel, batches, cache_tokens, target_tokens
from overfill.making.evaluate.token_metrics import Metric, MetricAccumulator
from overfill.model.transformer import ForwardModel
from overfill.telemetry.progress import Report, silent

_ROWS = 128  # rows per softmax, which needs memory for a few [rows, vocab] tensors


@dataclass(frozen=True, slots=True)
class TeacherForced:
    """Figures over answer tokens 1 and up, in nats.

    Attributes:
        nll: Negative log likelihood of the answer's own tokens.
        kl: Forward KL divergence, KL(full model || this model).
        agreement: Share of tokens at which both models have the same most likely token.
    """

    nll: Metric
    kl: Metric
    agreement: Metric

    def to_json(self) -> dict[str, Any]:
        return {"nll": self.nll.to_json(), "kl": self.kl.to_json(), "agreement": self.agreement.to_json()}


KvForm = Literal["int8", "int8 cache"]


@dataclass(frozen=True, slots=True)
class Candidate:
    """A decoder to judge. ``layer_map[i]`` is the full-model layer whose KV its layer i reads."""

    model: ForwardModel
    layer_map: Sequence[int]


@dataclass(frozen=True, slots=True)
class Judgement:
    """Figures of one candidate.

    Attributes:
        two_stage: Figures on the full model's KV of the prompt.
        alone: Figures of the candidate as a model that reads the prompt itself.
        by_kv_form: Two-stage figures for each requested other form of KV.
    """

    two_stage: TeacherForced
    alone: TeacherForced
    by_kv_form: Mapping[KvForm, TeacherForced]


def scorable(transcripts: Sequence[Transcript]) -> list[Transcript]:
    """Returns the transcripts with a prompt and two answer tokens or more, because the first one is not judged.

    Raises:
        InvalidRequest: no transcript qualifies.
    """
    kept = [t for t in transcripts if t.answer_start > 0 and len(t.answer) > 1]
    if not kept:
        raise InvalidRequest("data", "holds no answer of two tokens or more; give conversations with longer answers")
    return kept


def teacher_forced(
    full: ForwardModel,
    candidates: Mapping[str, Candidate],
    transcripts: Sequence[Transcript],
    *,
    kv_forms: Sequence[KvForm] = (),
    step: str = "Teacher forcing",
    report: Report = silent,
) -> tuple[TeacherForced, dict[str, Judgement]]:
    """Judges the full model and every candidate; the full model reads each transcript once.

    All models must have the same device and dtype.

    Args:
        kv_forms: Further forms of KV to judge: int8 for the prompt's KV on its way, or an int8 cache for all KV.

    Raises:
        InvalidRequest: as ``scorable``.
    """
    transcripts = scorable(transcripts)
    max_tokens = cache_tokens(transcripts)
    reader = BatchModel(full, max_tokens)
    halves = {name: BatchModel(candidate.model, max_tokens) for name, candidate in candidates.items()}
    int8_cached = {}
    if "int8 cache" in kv_forms:
        int8_cached = {name: BatchModel(candidate.model, max_tokens, "int8") for name, candidate in candidates.items()}
    full_accumulator = _TeacherForcedAccumulator()
    two_stage = {name: _TeacherForcedAccumulator() for name in candidates}
    alone = {name: _TeacherForcedAccumulator() for name in candidates}
    by_kv_form = {name: {form: _TeacherForcedAccumulator() for form in kv_forms} for name in candidates}
    done = 0
    for batch in batches(transcripts):
        targets = target_tokens(batch, 1).to(full.device)
        truth = reader.read_all(batch, 1)
        full_accumulator.add(batch, truth, truth, targets)
        for name, half in halves.items():
            two_stage[name].add(batch, truth, half.read_answers(batch, reader, candidates[name].layer_map), targets)
            for form, accumulator in by_kv_form[name].items():
                layer_map = candidates[name].layer_map
                if form == "int8 cache":
                    logits = int8_cached[name].read_answers(batch, reader, layer_map)
                else:
                    logits = half.read_answers(batch, reader, layer_map, int8=True)
                accumulator.add(batch, truth, logits, targets)
            alone[name].add(batch, truth, half.read_all(batch, 1), targets)
        done += len(batch)
        report(step, done, len(transcripts))
    judgements = {
        name: Judgement(
            two_stage[name].result(),
            alone[name].result(),
            {form: accumulator.result() for form, accumulator in by_kv_form[name].items()},
        )
        for name in candidates
    }
    return full_accumulator.result(), judgements


class _TeacherForcedAccumulator:
    """Collects one variant's figures, batch by batch."""

    def __init__(self) -> None:
        self._nll, self._kl, self._agreement = MetricAccumulator(), MetricAccumulator(), MetricAccumulator()

    def add(self, batch: Sequence[Transcript], truth: Tensor, logits: Tensor, targets: Tensor) -> None:
        """Adds a batch: ``truth`` and ``logits`` [N, vocab], ``targets`` [N], a row per answer token 1 and up."""
        nll, kl, agreement = (torch.cat(parts).cpu() for parts in zip(*_compare(truth, logits, targets), strict=True))
        start = 0
        for transcript in batch:
            rows = slice(start, start + len(transcript.answer) - 1)
            for accumulator, values in ((self._nll, nll), (self._kl, kl), (self._agreement, agreement)):
                accumulator.add(values[rows], 1)
            start = rows.stop

    def result(self) -> TeacherForced:
        return TeacherForced(self._nll.metric(), self._kl.metric(), self._agreement.metric())


def _compare(truth: Tensor, logits: Tensor, targets: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yields (NLL of ``targets``, KL(truth || logits), same argmax), each [rows] float32, a few rows at a time."""
    for p_logits, q_logits, tokens in zip(truth.split(_ROWS), logits.split(_ROWS), targets.split(_ROWS), strict=True):
        p, q = p_logits.log_softmax(-1), q_logits.log_softmax(-1)
        nll = -q.gather(1, tokens.unsqueeze(1)).squeeze(1)
        kl = (p.exp() * (p - q)).sum(-1)
        yield nll, kl, (p_logits.argmax(-1) == q_logits.argmax(-1)).float()

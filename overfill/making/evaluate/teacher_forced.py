"""Judge how a decoder predicts given answers: likelihood, KL divergence from the full model, and agreement with it.

The full model always writes the first answer token, so that all figures are over the tokens after it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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


Form = Literal["two_stage", "two_stage_int8", "two_stage_int8_cache", "decoder_alone"]
"""How a decoder is judged: on the full model's KV of the prompt, as it is, rounded to int8 on its way, or in an int8
cache that holds the answer's KV too; or as a model that reads the prompt itself."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A decoder to judge.

    Attributes:
        layer_map: ``layer_map[i]`` is the full-model layer whose KV its layer i reads.
    """

    model: ForwardModel
    layer_map: Sequence[int]


def scorable(transcripts: Sequence[Transcript]) -> list[Transcript]:
    """Returns the transcripts that have judged tokens.

    Raises:
        InvalidRequest: no transcript qualifies.
    """
    kept = [t for t in transcripts if t.has_judged_tokens]
    if not kept:
        raise InvalidRequest("data", "holds no answer of two tokens or more; give conversations with longer answers")
    return kept


def teacher_forced(
    full: ForwardModel,
    candidate: Candidate,
    transcripts: Sequence[Transcript],
    forms: Sequence[Form] = ("two_stage",),
    *,
    step: str = "Teacher forcing",
    report: Report = silent,
) -> tuple[TeacherForced, dict[Form, TeacherForced]]:
    """Judges the full model, and the candidate in each of ``forms``. Both models have the same device and dtype.

    Raises:
        InvalidRequest: as ``scorable``.
    """
    transcripts = scorable(transcripts)
    max_tokens = cache_tokens(transcripts)
    reader, half = BatchModel(full, max_tokens), BatchModel(candidate.model, max_tokens)
    cached = BatchModel(candidate.model, max_tokens, "int8") if "two_stage_int8_cache" in forms else half
    full_accumulator = _TeacherForcedAccumulator()
    accumulators = {form: _TeacherForcedAccumulator() for form in forms}

    def logits(form: Form, batch: Sequence[Transcript]) -> Tensor:
        if form == "decoder_alone":
            return half.read_all(batch, 1)
        writer = cached if form == "two_stage_int8_cache" else half
        return writer.read_answers(batch, reader, candidate.layer_map, int8=form == "two_stage_int8")

    done = 0
    for batch in batches(transcripts):
        targets = target_tokens(batch, 1).to(full.device)
        truth = reader.read_all(batch, 1)
        full_accumulator.add(batch, truth, truth, targets)
        for form, accumulator in accumulators.items():
            accumulator.add(batch, truth, logits(form, batch), targets)
        done += len(batch)
        report(step, done, len(transcripts))
    return full_accumulator.result(), {form: accumulator.result() for form, accumulator in accumulators.items()}


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
                accumulator.add(values[rows], 1, transcript.kind)
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

"""The decoder in training and its loss: teacher-forced on answers, two-stage or standalone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from overfill.making.conversations import Transcript
from overfill.making.distill.loss import (
    LossWeights,
    TeacherView,
    compare_with_teacher,
    distillation_loss,
    top_k_distillation_loss,
)
from overfill.making.distill.model import PackedModel
from overfill.making.distill.packed_rows import PackedRows, in_packs, learnt_tokens
from overfill.making.distill.sampled_vocabulary import SampledVocabulary, sample_vocabulary
from overfill.making.distill.teacher import Teacher, TeacherOutputs


class Student(nn.Module):
    """The decoder with its loss, as one module.

    Args:
        decoder: The model to train, in float32.
        teacher_head: [vocab, full hidden]; turns the full model's hidden states into logits.
        standalone: Let the decoder read the prompt itself, as a pruned model without a full model would. All else,
            the learnt tokens included, is the same.
        dtype: Type of the matrix products. Types other than float32 use autocast.
    """

    def __init__(
        self, decoder: PackedModel, teacher_head: Tensor, weights: LossWeights, standalone: bool, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.decoder = decoder
        self.standalone = standalone
        self._teacher_head = teacher_head.detach()
        self._weights = weights
        self._dtype = dtype

    def rows(self, transcripts: Sequence[Transcript]) -> PackedRows:
        rows = PackedRows.of_whole(transcripts) if self.standalone else PackedRows.of_answers(transcripts)
        return rows.to(self._teacher_head.device)

    def hidden(self, rows: PackedRows, teacher_outputs: TeacherOutputs) -> Tensor:
        """Computes the hidden states of the predicting rows. [N, hidden] in ``dtype``"""
        narrow = self._dtype != torch.float32
        with torch.autocast(rows.token_ids.device.type, dtype=self._dtype if narrow else None, enabled=narrow):
            hidden: Tensor = self.decoder(rows, None if self.standalone else teacher_outputs.prefix)
        return hidden[rows.predicting].to(self._dtype)

    def teacher_view(self, teacher_outputs: TeacherOutputs) -> TeacherView | None:
        return None if teacher_outputs.hidden is None else TeacherView(teacher_outputs.hidden, self._teacher_head)

    def sample_vocabulary(
        self, rows: PackedRows, teacher_outputs: TeacherOutputs, sampled: int, generator: torch.Generator
    ) -> SampledVocabulary | None:
        """Samples the vocabulary for the loss; returns None unless training uses the full model's top tokens."""
        if teacher_outputs.top_ids is None:
            return None
        return sample_vocabulary(rows.targets, teacher_outputs.top_ids, len(self._teacher_head), sampled, generator)

    def forward(
        self, rows: PackedRows, teacher_outputs: TeacherOutputs, sampled: SampledVocabulary | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the sums of loss, cross-entropy and KL over the learnt tokens; the loss carries the gradient."""
        hidden = self.hidden(rows, teacher_outputs)
        if sampled is not None and teacher_outputs.top_probabilities is not None:
            sums = top_k_distillation_loss(
                hidden, self.decoder.head, sampled, teacher_outputs.top_probabilities, self._weights
            )
        else:
            sums = distillation_loss(
                hidden, self.decoder.head, rows.targets, self.teacher_view(teacher_outputs), self._weights
            )
        return sums.loss, sums.cross_entropy, sums.kl


@dataclass(frozen=True, slots=True)
class HeldOutResult:
    """A decoder's quality on held-out answers, as means over the judged tokens.

    Attributes:
        nll: Negative log likelihood of the answers' tokens, in nats.
        kl: KL(full model || decoder), in nats.
        agreement: Share of tokens at which both have the same most likely token.
        tokens: Number of judged tokens.
    """

    nll: float
    kl: float
    agreement: float
    tokens: int

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


@torch.no_grad()
def evaluate(student: Student, teacher: Teacher, held_out: Mapping[int, Transcript], pack_rows: int) -> HeldOutResult:
    """Judges the decoder on ``held_out``; ``teacher`` must give hidden states, and prompt KV unless standalone."""
    nll = kl = 0.0
    agreed = tokens = 0
    for pack in in_packs(held_out, lambda i: len(held_out[i].token_ids), pack_rows):
        transcripts = {i: held_out[i] for i in pack}
        teacher_outputs = teacher(transcripts)
        view = student.teacher_view(teacher_outputs)
        assert view is not None
        rows = student.rows(list(transcripts.values()))
        found = compare_with_teacher(student.hidden(rows, teacher_outputs), student.decoder.head, rows.targets, view)
        nll, kl, agreed = nll + found.nll, kl + found.kl, agreed + found.agreed
        tokens += sum(map(learnt_tokens, transcripts.values()))
    return HeldOutResult(nll / tokens, kl / tokens, agreed / tokens, tokens)

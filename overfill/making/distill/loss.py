"""Computes cross-entropy and forward KL over a large vocabulary without holding all logits in memory.

Rows go through the heads in chunks. The gradients for the decoder's hidden states and head have a closed form, so the
forward pass computes them together with the loss; the backward pass only scales them. Logits are thus computed once,
and they need only a few buffers of one chunk.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from overfill.making.distill.sampled_vocabulary import SampledVocabulary

_CHUNK = {"cpu": 128, "cuda": 1024}  # rows: buffers that fit a CPU's cache, enough work for a GPU
_MIN_PROBABILITY = 1e-7  # about the precision of 1 minus a float32 sum; keeps logarithms finite


@dataclass(frozen=True, slots=True)
class LossWeights:
    """Weights of the two terms: cross-entropy on the answer's tokens, and KL(full model || decoder).

    KL is taken at ``temperature`` and multiplied by its square, which keeps the gradient's size (arXiv 1503.02531,
    section 2).
    """

    cross_entropy: float
    kl: float
    temperature: float = 1.0


@dataclass(frozen=True, slots=True)
class LossSums:
    """Sums over rows.

    Attributes:
        loss: The weighted loss, a scalar that carries the gradient.
        cross_entropy, kl: The unweighted terms in nats, scalars. ``kl`` is 0 without a full model.
    """

    loss: Tensor
    cross_entropy: Tensor
    kl: Tensor


@dataclass(frozen=True, slots=True)
class TeacherView:
    """The full model's hidden states [N, full hidden] for the same rows, and its head [vocab, full hidden]."""

    hidden: Tensor
    head: Tensor


def distillation_loss(
    hidden: Tensor, head: Tensor, targets: Tensor, teacher: TeacherView | None, weights: LossWeights
) -> LossSums:
    """Computes cross-entropy and KL over the whole vocabulary.

    Args:
        hidden: [N, hidden], after the last norm. Its dtype is that of the matrix products.
        head: [vocab, hidden]; may have a wider dtype than ``hidden``.
        targets: [N] int64.
        teacher: Full model's side. None leaves KL out.
    """
    return _chunked_loss(hidden, head, _FullVocabularyLoss(targets, teacher, weights), weights)


def top_k_distillation_loss(
    hidden: Tensor, head: Tensor, sampled: SampledVocabulary, top_probabilities: Tensor, weights: LossWeights
) -> LossSums:
    """Computes ``distillation_loss`` from the full model's k most likely tokens; all others count as one token.

    The resulting KL is a lower bound of the full KL; it is tight when the top tokens hold nearly all probability. When
    ``sampled`` is only a part of the vocabulary, cross-entropy and KL are estimates. The temperature must be 1.

    Args:
        top_probabilities: [N, k] float32, the full model's probabilities of the tokens in ``sampled.top``.
    """
    chosen = head if sampled.ids is None else head.index_select(0, sampled.ids)
    return _chunked_loss(hidden, chosen, _TopKLoss(sampled, top_probabilities, weights), weights)


def _chunked_loss(hidden: Tensor, head: Tensor, chunk_loss: _ChunkLoss, weights: LossWeights) -> LossSums:
    loss, parts = _ChunkedLoss.apply(hidden, head, chunk_loss, weights)  # type: ignore[no-untyped-call]
    return LossSums(loss, parts[0], parts[1])


class _ChunkLoss(Protocol):
    def __call__(self, rows: slice, logits: Tensor, parts: Tensor) -> Tensor:
        """Adds cross-entropy and KL of the rows to ``parts`` ([2] float64) and returns the gradient for their logits.

        May overwrite ``logits`` ([rows, vocab] float32). The gradient, of the weighted loss, lies in a buffer that the
        next call overwrites.
        """


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: Tensor, chunk_loss: _ChunkLoss, weights: LossWeights
    ) -> tuple[Tensor, Tensor]:
        of_hidden, of_head = ctx.needs_input_grad[:2]
        narrow_head = head.to(hidden.dtype)
        hidden_grad = torch.empty_like(hidden) if of_hidden else None
        head_grad = torch.zeros(head.shape, dtype=torch.float32, device=head.device) if of_head else None
        parts = torch.zeros(2, dtype=torch.float64, device=hidden.device)
        chunk = min(_CHUNK.get(hidden.device.type, 1024), len(hidden))
        buffer = torch.empty(chunk, len(head), dtype=torch.float32, device=hidden.device)
        for start in range(0, len(hidden), max(chunk, 1)):
            rows = slice(start, min(start + chunk, len(hidden)))
            logits = buffer[: rows.stop - rows.start]
            _product(hidden[rows], narrow_head, logits)
            logits_grad = chunk_loss(rows, logits, parts)
            logits_grad = logits_grad.to(hidden.dtype)
            if hidden_grad is not None:
                torch.mm(logits_grad, narrow_head, out=hidden_grad[rows])
            if head_grad is not None:
                _add_product(head_grad, logits_grad.T, hidden[rows])
        ctx.save_for_backward(hidden_grad, head_grad)
        ctx.mark_non_differentiable(parts)
        loss = weights.cross_entropy * parts[0] + weights.kl * parts[1]
        return loss.float(), parts

    @staticmethod
    def backward(ctx: Any, loss_grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        hidden_grad, head_grad = ctx.saved_tensors
        if hidden_grad is not None:
            hidden_grad = hidden_grad * loss_grad.to(hidden_grad.dtype)
        return hidden_grad, None if head_grad is None else head_grad.mul_(loss_grad), None, None


class _Buffers:
    """Reusable tensors of one chunk's shape: allocating them anew would take as long as filling them."""

    def __init__(self) -> None:
        self._made: dict[str, Tensor] = {}

    def like(self, logits: Tensor, name: str) -> Tensor:
        made = self._made.get(name)
        if made is None:
            made = self._made[name] = torch.empty_like(logits)
        return made[: len(logits)]


class _FullVocabularyLoss:
    """Loss over the whole vocabulary, with the full model's logits."""

    def __init__(self, targets: Tensor, teacher: TeacherView | None, weights: LossWeights) -> None:
        self._targets, self._teacher, self._weights = targets, teacher, weights
        self._buffers = _Buffers()

    def __call__(self, rows: slice, logits: Tensor, parts: Tensor) -> Tensor:
        weights = self._weights
        probabilities = self._buffers.like(logits, "probabilities")
        log_sum = _softmax(logits, probabilities)
        columns = self._targets[rows, None]
        parts[0] += (log_sum - logits.gather(1, columns)).sum()
        if self._teacher is None:
            gradient = probabilities.mul_(weights.cross_entropy)
        elif weights.temperature == 1:
            kl, theirs = self._kl(self._teacher, rows, logits, log_sum)
            parts[1] += kl
            gradient = probabilities.mul_(weights.cross_entropy + weights.kl).sub_(theirs, alpha=weights.kl)
        else:
            softened = self._buffers.like(logits, "softened")
            log_sum = _softmax(logits.div_(weights.temperature), softened)
            kl, theirs = self._kl(self._teacher, rows, logits, log_sum)
            parts[1] += kl * weights.temperature**2
            factor = weights.kl * weights.temperature
            gradient = probabilities.mul_(weights.cross_entropy).add_(softened, alpha=factor).sub_(theirs, alpha=factor)
        return gradient.scatter_add_(1, columns, _constant(columns, -weights.cross_entropy))

    def _kl(self, teacher: TeacherView, rows: slice, logits: Tensor, log_sum: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the sum of KL(full model || decoder) over the rows, and the full model's probabilities."""
        theirs, scratch = self._buffers.like(logits, "theirs"), self._buffers.like(logits, "their logits")
        _product(teacher.hidden[rows], teacher.head, scratch)
        if self._weights.temperature != 1:
            scratch.div_(self._weights.temperature)
        their_log_sum = _softmax(scratch, theirs)
        return scratch.sub_(logits).mul_(theirs).sum() + (log_sum - their_log_sum).sum(), theirs


class _TopKLoss:
    """Loss over a sampled vocabulary, with the full model's most likely tokens and one token for the rest."""

    def __init__(self, sampled: SampledVocabulary, top_probabilities: Tensor, weights: LossWeights) -> None:
        self._sampled, self._theirs, self._weights = sampled, top_probabilities, weights
        self._buffers = _Buffers()

    def __call__(self, rows: slice, logits: Tensor, parts: Tensor) -> Tensor:
        weights, sampled = self._weights, self._sampled
        if sampled.log_weights is not None:
            logits.add_(sampled.log_weights)
        probabilities = self._buffers.like(logits, "probabilities")
        log_sum = _softmax(logits, probabilities)
        columns, top, theirs = sampled.targets[rows, None], sampled.top[rows], self._theirs[rows]
        parts[0] += (log_sum - logits.gather(1, columns)).sum()
        ours = probabilities.gather(1, top)
        rest = (1 - ours.sum(1, keepdim=True)).clamp(min=_MIN_PROBABILITY)
        their_rest = (1 - theirs.sum(1, keepdim=True)).clamp(min=0)
        parts[1] += (theirs * (theirs.clamp(min=_MIN_PROBABILITY).log() - logits.gather(1, top) + log_sum)).sum()
        parts[1] += (their_rest * (their_rest.clamp(min=_MIN_PROBABILITY).log() - rest.log())).sum()
        # The rest counts as one token; its gradient is shared among its members by their probabilities.
        ratio = their_rest / rest
        gradient = probabilities.mul_(weights.cross_entropy + weights.kl * (1 - ratio))
        gradient.scatter_add_(1, top, weights.kl * (ours * ratio - theirs))
        return gradient.scatter_add_(1, columns, _constant(columns, -weights.cross_entropy))


def _constant(like: Tensor, value: float) -> Tensor:
    return torch.full(like.shape, value, dtype=torch.float32, device=like.device)


def _softmax(logits: Tensor, out: Tensor) -> Tensor:
    """Writes probabilities to ``out`` and returns the logarithm of the sum of exponentials, [rows, 1]."""
    torch.softmax(logits, -1, out=out)
    # The largest logit and its probability determine the sum. On a CPU this is several times faster than logsumexp.
    return logits.amax(-1, keepdim=True) - out.amax(-1, keepdim=True).log()


def _product(hidden: Tensor, head: Tensor, out: Tensor) -> None:
    """Computes ``hidden @ head.T`` in the dtype of ``hidden`` into the float32 ``out``."""
    if hidden.dtype == out.dtype:
        torch.mm(hidden, head.T, out=out)
    else:
        out.copy_(hidden @ head.T)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    else:
        total.add_(a @ b)


@dataclass(frozen=True, slots=True)
class ComparisonSums:
    """Sums over rows: negative log likelihood and KL in nats, and the count of equal most likely tokens."""

    nll: float
    kl: float
    agreed: int


@torch.no_grad()
def compare_with_teacher(hidden: Tensor, head: Tensor, targets: Tensor, teacher: TeacherView) -> ComparisonSums:
    """Compares the decoder with the full model; the arguments are those of ``distillation_loss``."""
    parts = torch.zeros(2, dtype=torch.float64, device=hidden.device)
    agreed = torch.zeros((), dtype=torch.int64, device=hidden.device)
    head = head.to(hidden.dtype)
    chunk = _CHUNK.get(hidden.device.type, 1024)
    for start in range(0, len(hidden), chunk):
        rows = slice(start, start + chunk)
        logits, theirs = (hidden[rows] @ head.T).float(), (teacher.hidden[rows] @ teacher.head.T).float()
        agreed += (logits.argmax(-1) == theirs.argmax(-1)).sum()
        logits, theirs = logits.log_softmax(-1), theirs.log_softmax(-1)
        parts[0] -= logits.gather(1, targets[rows, None]).sum()
        parts[1] += (theirs.exp() * (theirs - logits)).sum()
    return ComparisonSums(float(parts[0]), float(parts[1]), int(agreed))

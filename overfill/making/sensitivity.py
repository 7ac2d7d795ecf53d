"""Measures how much a full model's answers depend on its residual stream, by one backward pass. Nothing is trained.

The measure is the Fisher information of the answers' distributions. Let g be the gradient of the log-likelihood of a
token drawn from the model's own distribution. Moving a vector by d then changes the distribution by a KL divergence of
d' E[g g'] d / 2. Pruning can thus weigh each cut by its damage to the answers.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, linear
from torch.utils.checkpoint import checkpoint

from overfill.errors import InvalidPair
from overfill.making.layerwise import LayerMath, PackedPart, PackedTranscripts, attend_part
from overfill.model.config import ModelConfig
from overfill.model.loading import LayerWeights, Weights
from overfill.telemetry.progress import Report, silent

_DAMPING = 1e-3  # times the mean of the diagonal, so that directions absent from the few tokens still count


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """Second moments of the gradients at answer tokens, each scaled to a mean diagonal of one.

    Attributes:
        streams: [num_layers, hidden, hidden] float32; for the residual stream after each layer.
        readers: [hidden, hidden] float32; for the normalised residual stream, averaged over all norms.
    """

    streams: Tensor
    readers: Tensor


def measure_sensitivity(
    full: Weights, config: ModelConfig, packed: PackedTranscripts, report: Report = silent
) -> Sensitivity:
    """Runs the full model forward and backward over ``packed``.

    Args:
        full: Weights in float32 with the norms folded in (``fold_norms``).
        packed: Transcripts in small parts. Memory holds the residual streams of one part at all layers, about 5 MB per
            token at 8B; all other activations are computed again in the backward pass.

    Raises:
        InvalidPair: a layer's output is not finite; the message names the layer.
    """
    math = LayerMath(config, int(packed.positions.max()) + 1)
    hidden = config.hidden_size
    streams = torch.zeros(config.num_layers, hidden, hidden)
    reads = torch.zeros(2 * config.num_layers + 1, hidden, hidden)
    generator = torch.Generator().manual_seed(0)
    for number, part in enumerate(packed.parts):
        x = full.embedding[packed.token_ids[part.rows]].clone().requires_grad_()
        outs: list[Tensor] = []
        normed: list[Tensor] = []
        attention = partial(_attention, math, packed, part)
        for index, layer in enumerate(full.layers):
            before = math.norm(x)
            middle = x + checkpoint(attention, layer, before, use_reentrant=False)
            middle_normed = math.norm(middle)
            x = middle + checkpoint(_mlp, math, layer, middle_normed, use_reentrant=False)
            if not x.isfinite().all():
                raise InvalidPair(f"scoring layer {index}: its output is not finite; the checkpoint is damaged")
            outs.append(x)
            normed += [before, middle_normed]
        normed.append(math.norm(x))
        for kept in (*outs, *normed):
            kept.retain_grad()
        logits = normed[-1][part.answers] @ full.head.T
        drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
        cross_entropy(logits, drawn, reduction="sum").backward()
        for sums, tensors in ((streams, outs), (reads, normed)):
            for total, tensor in zip(sums, tensors, strict=True):
                assert tensor.grad is not None
                gradient = tensor.grad[part.answers]
                total += gradient.T @ gradient
        report("Measuring sensitivity", number + 1, len(packed.parts))
    return Sensitivity(_scaled(streams), _scaled(_scaled(reads).mean(0, keepdim=True))[0])


def _attention(
    math: LayerMath, packed: PackedTranscripts, part: PackedPart, layer: LayerWeights, normed: Tensor
) -> Tensor:
    return attend_part(math, layer, packed, part, normed)[0]


def _mlp(math: LayerMath, layer: LayerWeights, normed: Tensor) -> Tensor:
    return linear(math.neurons(layer, normed), layer.down, layer.down_bias)


def matrix_sqrt(moments: Tensor) -> Tensor:
    """Returns the symmetric square root of a symmetric positive semidefinite matrix, in float64."""
    values, vectors = torch.linalg.eigh(moments.double())
    result: Tensor = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    return result


def _scaled(moments: Tensor) -> Tensor:
    """Scales each matrix of [..., n, n] to a mean diagonal of one and damps it, in place."""
    diagonals = moments.diagonal(dim1=-2, dim2=-1)
    moments /= diagonals.mean(-1)[:, None, None].clamp(min=torch.finfo(torch.float32).tiny)
    diagonals += _DAMPING
    return moments

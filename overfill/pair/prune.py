"""Smaller decoders without training: what matters in a full model, which parts to keep, and the model of those.

Three separate steps: ``score`` measures the full model while it answers, ``make_pruning_plan`` chooses parts for any
size, and ``slice_weights`` cuts. Scores are saved beside the decoder. Attention heads and the width of the KV cache
never change, so that the decoder fits the full model's KV cache (OverFill, arXiv 2508.08446, section 3).
"""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from overfill.errors import InvalidPair
from overfill.model.config import ModelConfig
from overfill.model.head import head_mask_of, lower_rank
from overfill.model.loading import LayerWeights, Weights
from overfill.pair.checkpoint import save_tensors
from overfill.pair.layerwise import LayerMath, PackedTranscripts, run_full_layer
from overfill.pair.neuron_selection import removal_order
from overfill.pair.recipe import Method
from overfill.pair.sensitivity import Sensitivity, matrix_sqrt
from overfill.telemetry.progress import Report, silent

_DIGEST = "full_digest"
_ROWS_OF_LOGITS = 512  # at a time; each is as wide as the vocabulary


@dataclass(frozen=True, slots=True)
class Scores:
    """What matters in a full model, measured on the tokens of its own answers.

    Attributes:
        neurons: [num_layers, intermediate_size] int64; the place of every MLP neuron in the order in which the
            layer's neurons would go (``removal_order``); the higher the longer it stays.
        channels: [hidden_size] float32; mean absolute value in the normalised residual stream, over all norms.
        channel_shares: [hidden_size] float32; share of that stream's mean square that is in each channel.
        directions: [hidden_size, hidden_size] float32; orthonormal columns. The first k span what a stream of k
            elements should keep of the normalised residual stream, whatever k is (``leading_directions``).
        direction_shares: [hidden_size] float32; share of the mean square along each of them.
        token_shares: [vocab] float32; mean probability that each token is given.
    """

    neurons: Tensor
    channels: Tensor
    channel_shares: Tensor
    directions: Tensor
    direction_shares: Tensor
    token_shares: Tensor

    def save(self, file: Path, full_digest: str) -> None:
        """``full_digest``: of the checkpoint that they are of (``checkpoint_digest``)."""
        tensors = {field.name: getattr(self, field.name).contiguous() for field in fields(self)}
        tensors["neurons"] = self.neurons.to(torch.int32)
        save_tensors(tensors, file, {_DIGEST: full_digest})

    @classmethod
    def load(cls, file: Path, full_digest: str) -> Scores | None:
        """Those in ``file``; None when they are of another checkpoint. Raises InvalidPair when it holds no scores."""
        try:
            with safe_open(file, "pt") as stored:
                if (stored.metadata() or {}).get(_DIGEST) != full_digest:
                    return None
                tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118  (no mapping)
            return cls(**(tensors | {"neurons": tensors["neurons"].long()}))
        except (OSError, KeyError, TypeError, SafetensorError) as error:
            raise InvalidPair(f"{file}: no scores: {error}") from None


@torch.inference_mode()
def score(
    full: Weights, config: ModelConfig, packed: PackedTranscripts, sensitivity: Sensitivity, report: Report = silent
) -> Scores:
    """Runs the full model over ``packed``, layer by layer, and scores what it does while it answers.

    Args:
        full: float32, norms folded in (``fold_norms``).
        sensitivity: what its answers depend on.

    Raises:
        InvalidPair: a layer computes what is not finite; it is named.
    """
    math = LayerMath(config, int(packed.positions.max()) + 1)
    stream = full.embedding[packed.token_ids]  # [rows, hidden]
    covariance = torch.zeros(config.hidden_size, config.hidden_size)
    channels = torch.zeros(config.hidden_size)
    places = []
    for index, layer in enumerate(full.layers):
        moments = torch.zeros(config.intermediate_size, config.intermediate_size)
        for part in packed.parts:
            done = run_full_layer(math, layer, packed, part, stream[part.rows])
            stream[part.rows] = done.out
            for normed in (done.normed[part.answers], done.middle_normed[part.answers]):
                covariance += normed.T @ normed
                channels += normed.abs().sum(0)
            neurons = done.neurons[part.answers]
            moments += neurons.T @ neurons
        if not moments.isfinite().all():
            raise InvalidPair(f"scoring layer {index}: its neurons' outputs are not finite; the checkpoint is damaged")
        places.append(removal_order(moments, matrix_sqrt(sensitivity.streams[index]).float() @ layer.down))
        report("Scoring", index + 1, config.num_layers)
    seen = 2 * config.num_layers * len(packed.answers)
    covariance /= seen
    directions = leading_directions(covariance, sensitivity.readers)
    whole = torch.trace(covariance)
    return Scores(
        neurons=torch.stack(places),
        channels=channels / seen,
        channel_shares=covariance.diagonal() / whole,
        directions=directions,
        direction_shares=(covariance @ directions * directions).sum(0) / whole,
        token_shares=_token_shares(math.norm(stream[packed.answers]), full.head),
    )


def _token_shares(normed: Tensor, head: Tensor) -> Tensor:
    """``Scores.token_shares`` of the last norm's outputs, [answer rows, hidden]."""
    total = torch.zeros(len(head))
    for rows in normed.split(_ROWS_OF_LOGITS):
        total += (rows @ head.T).softmax(1).sum(0)
    return total / len(normed)


def leading_directions(covariance: Tensor, sensitivity: Tensor) -> Tensor:
    """An orthonormal basis whose first k columns are, for every k, the best k linear measurements of a vector x.

    Best means that the least-squares reconstruction of x from them has the least mean of e' S e, e being its error
    and S the sensitivity: the measurements are the leading left singular vectors of S^1/2 C^1/2, times S^1/2, C being
    x's second moment. Where S is the identity they are C's principal directions.

    Args:
        covariance, sensitivity: [n, n], symmetric; the sensitivity positive definite.

    Returns:
        [n, n] float32
    """
    weight = matrix_sqrt(sensitivity)
    leading = torch.linalg.svd(weight @ matrix_sqrt(covariance)).U
    basis: Tensor = torch.linalg.qr(weight @ leading).Q
    return basis.float()


@dataclass(frozen=True, slots=True)
class PruningPlan:
    """What a decoder keeps of a full model.

    Attributes:
        layers: of the full model, ascending; the decoder's layer map.
        neurons: [intermediate_size] int64 for each of ``layers``, ascending.
        basis: [full hidden_size, hidden_size]; orthonormal columns, the directions of the residual stream that stay.
        scale: what the normalised stream, cut to ``basis`` and normalised again, must be multiplied by to be as large
            as it was in those directions: RMSNorm divides by the mean square over fewer, larger elements.
    """

    layers: tuple[int, ...]
    neurons: tuple[Tensor, ...]
    basis: Tensor
    scale: float = 1.0

    @property
    def reader_basis(self) -> Tensor:
        """What a projection that reads the normalised stream is multiplied by. [full hidden_size, hidden_size]"""
        return self.basis * self.scale


def make_pruning_plan(
    scores: Scores, *, hidden_size: int, intermediate_size: int, layers: Sequence[int], method: Method
) -> PruningPlan:
    """Chooses what to keep.

    Args:
        method: ``channel`` keeps the largest channels of the residual stream, ``rotate`` its leading directions.

    Raises:
        InvalidPair: a size is out of range.
    """
    num_layers, widest = scores.neurons.shape
    full_hidden = len(scores.channels)
    for name, size, most in (
        ("hidden_size", hidden_size, full_hidden),
        ("intermediate_size", intermediate_size, widest),
        ("layers", len(layers), num_layers),
    ):
        if not 1 <= size <= most:
            raise InvalidPair(f"{name} must be in 1..{most}, got {size}")
    scale = 1.0
    if hidden_size == full_hidden:
        basis = torch.eye(full_hidden)
    elif method == "channel":
        channels = scores.channels.topk(hidden_size).indices.sort().values
        basis = torch.eye(full_hidden)[:, channels]
        scale = _scale(scores.channel_shares[channels], full_hidden)
    else:
        basis = scores.directions[:, :hidden_size]
        scale = _scale(scores.direction_shares[:hidden_size], full_hidden)
    kept = tuple(scores.neurons[layer].topk(intermediate_size).indices.sort().values for layer in layers)
    return PruningPlan(tuple(layers), kept, basis, scale)


def _scale(shares: Tensor, full_hidden: int) -> float:
    """``PruningPlan.scale`` where what stays has these shares of the mean square."""
    return float((shares.sum() * full_hidden / len(shares)).sqrt())


@dataclass(frozen=True, slots=True)
class HeadPlan:
    """Which rows of the head stay; the others become a matrix of rank ``tail_rank`` (``overfill.model.head``).

    The rare ones are lowered as if they were equally frequent: weighing them made the rarest all but impossible.

    Attributes:
        shares: [vocab] float32, how frequent each token is. Of equals the lower ids stay: tokenizers give those to
            what is common elsewhere.
        tokens: rows that stay.
    """

    shares: Tensor
    tokens: int
    tail_rank: int

    def apply(self, head: Tensor, covariance: Tensor) -> Tensor:
        """``head`` [vocab, hidden] so lowered, for inputs of this covariance."""
        _, rest = self._split()
        return head.index_copy(0, rest, lower_rank(head[rest], covariance, self.tail_rank))

    def as_config(self) -> dict[str, Any]:
        """What ``config.json`` says of it, under ``HEAD_KEY``."""
        whole, _ = self._split()
        mask = b64encode(head_mask_of(whole, len(self.shares))).decode()
        return {"tokens": self.tokens, "tail_rank": self.tail_rank, "whole": mask}

    def _split(self) -> tuple[Tensor, Tensor]:
        """The tokens whose rows stay, and the others."""
        order = self.shares.argsort(descending=True, stable=True)
        return order[: self.tokens], order[self.tokens :]


def slice_weights(full: Weights, plan: PruningPlan, head: HeadPlan | None = None) -> Weights:
    """The decoder that ``plan`` cuts out of ``full`` (norms folded in); its gains are ones, its head is untied."""
    hidden = plan.basis.shape[1]
    layers = tuple(slice_layer(full.layers[i], kept, plan) for i, kept in zip(plan.layers, plan.neurons, strict=True))
    whole = full.head @ plan.reader_basis
    if head is not None:  # the normalised stream has no direction that is longer than others, as far as is known here
        whole = head.apply(whole, torch.eye(hidden))
    return Weights(full.embedding @ plan.basis, layers, torch.ones(hidden), whole)


def keep_neurons(gate_up: Tensor, neurons: Tensor) -> Tensor:
    """The rows, or elements, of ``neurons`` in both halves of a fused gate and up projection, or of its bias."""
    return torch.cat([part[neurons] for part in gate_up.chunk(2)])


def slice_layer(layer: LayerWeights, neurons: Tensor, plan: PruningPlan) -> LayerWeights:
    """One layer of ``slice_weights``."""
    basis = plan.basis
    ones = torch.ones(basis.shape[1])
    return replace(
        layer,
        input_norm=ones,
        qkv=layer.qkv @ plan.reader_basis,
        o=basis.T @ layer.o,
        o_bias=None if layer.o_bias is None else layer.o_bias @ basis,
        post_norm=ones,
        gate_up=keep_neurons(layer.gate_up, neurons) @ plan.reader_basis,
        gate_up_bias=None if layer.gate_up_bias is None else keep_neurons(layer.gate_up_bias, neurons),
        down=basis.T @ layer.down[:, neurons],
        down_bias=None if layer.down_bias is None else layer.down_bias @ basis,
    )

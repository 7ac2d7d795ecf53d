"""Smaller decoders without training: what matters in a full model, which parts to keep, and the model of those.

Three steps, apart: ``score`` looks at the full model while it answers, ``make_plan`` chooses from the scores at any
size, ``slice_weights`` cuts. Scores are saved beside the decoder. Attention heads and the width of the KV cache
always stay, so that the decoder fits the full model's KV cache (OverFill, arXiv 2508.08446, section 3).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from overfill.errors import InvalidPair
from overfill.model.config import ModelConfig
from overfill.model.loading import LayerWeights, Weights
from overfill.pair.packed import LayerMath, Packed, run_full_layer
from overfill.pair.progress import Report, silent
from overfill.pair.recipe import Method
from overfill.pair.selection import removal_order


@dataclass(frozen=True, slots=True)
class Scores:
    """What matters in a full model, measured on the tokens of its own answers.

    Attributes:
        neurons: [num_layers, intermediate_size] int64; the place of every MLP neuron in the order in which the
            layer's neurons would go (``removal_order``); the higher the longer it stays.
        channels: [hidden_size] float32; mean absolute value in the normalised residual stream, over all norms.
        covariance: [hidden_size, hidden_size] float32; second moment of the same.
    """

    neurons: Tensor
    channels: Tensor
    covariance: Tensor

    def save(self, file: Path) -> None:
        save_file({field.name: getattr(self, field.name) for field in fields(self)}, file)

    @classmethod
    def load(cls, file: Path) -> Scores:
        """Raises InvalidPair when ``file`` is missing or holds something else."""
        try:
            return cls(**load_file(file))
        except (OSError, TypeError, SafetensorError) as error:
            raise InvalidPair(f"{file}: no scores: {error}") from None


@torch.inference_mode()
def score(full: Weights, config: ModelConfig, packed: Packed, report: Report = silent) -> Scores:
    """Runs the full model over ``packed``, layer by layer, and scores what it does while it answers.

    Args:
        full: float32, norms folded in (``fold_norms``).

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
        places.append(removal_order(moments, layer.down))
        report("Scoring", index + 1, config.num_layers)
    seen = 2 * config.num_layers * len(packed.answers)
    return Scores(torch.stack(places), channels / seen, covariance / seen)


@dataclass(frozen=True, slots=True)
class Plan:
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


def make_plan(
    scores: Scores, *, hidden_size: int, intermediate_size: int, layers: Sequence[int], method: Method
) -> Plan:
    """Chooses what to keep.

    Args:
        method: ``channel`` keeps the largest channels of the residual stream, ``rotate`` its principal directions.

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
    if hidden_size == full_hidden:
        basis = torch.eye(full_hidden)
    elif method == "channel":
        basis = torch.eye(full_hidden)[:, scores.channels.topk(hidden_size).indices.sort().values]
    else:
        basis = torch.linalg.eigh(scores.covariance.double()).eigenvectors.flip(1)[:, :hidden_size].float()
    kept = tuple(scores.neurons[layer].topk(intermediate_size).indices.sort().values for layer in layers)
    captured = torch.trace(basis.T @ scores.covariance @ basis) / torch.trace(scores.covariance)
    scale = 1.0 if hidden_size == full_hidden else float((captured * full_hidden / hidden_size).sqrt())
    return Plan(tuple(layers), kept, basis, scale)


def slice_weights(full: Weights, plan: Plan) -> Weights:
    """The decoder that ``plan`` cuts out of ``full`` (norms folded in); its gains are ones, its head is untied."""
    hidden = plan.basis.shape[1]
    layers = tuple(slice_layer(full.layers[i], kept, plan) for i, kept in zip(plan.layers, plan.neurons, strict=True))
    return Weights(full.embedding @ plan.basis, layers, torch.ones(hidden), full.head @ plan.reader_basis)


def keep_neurons(gate_up: Tensor, neurons: Tensor) -> Tensor:
    """The rows, or elements, of ``neurons`` in both halves of a fused gate and up projection, or of its bias."""
    return torch.cat([part[neurons] for part in gate_up.chunk(2)])


def slice_layer(layer: LayerWeights, neurons: Tensor, plan: Plan) -> LayerWeights:
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

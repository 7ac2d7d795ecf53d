"""Prune a full model to a decoder without training: score its parts, plan which to keep, and cut.

Three separate steps: ``score`` measures the full model while it answers, ``make_pruning_plan`` chooses parts for any
size, and ``slice_weights`` cuts. Scores are saved beside the decoder. Attention heads and the width of the KV cache
never change, so that the decoder fits the full model's KV cache (OverFill, arXiv 2508.08446, section 3).
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from overfill.errors import InvalidPair
from overfill.making.checkpoint import save_tensors
from overfill.making.head_plan import HeadPlan
from overfill.making.layerwise import LayerMath, PackedTranscripts, run_full_layer
from overfill.making.neuron_selection import removal_order
from overfill.making.recipe import Method
from overfill.making.sensitivity import Sensitivity, matrix_sqrt
from overfill.model.config import ModelConfig
from overfill.model.loading import LayerWeights, Weights
from overfill.telemetry.progress import Report, silent

_FULL_DIGEST, _TEXT_DIGEST = "full_digest", "text_digest"
_ROWS_OF_LOGITS = 512  # computed at a time, because each row is as wide as the vocabulary


@dataclass(frozen=True, slots=True)
class Scores:
    """Importance of a full model's parts, measured on the tokens of its answers.

    Attributes:
        neurons: [num_layers, intermediate_size] int64; rank of each MLP neuron in its layer's removal order
            (``removal_order``). The neuron with the highest rank is removed last.
        channels: [hidden_size] float32; mean absolute value of each channel in the normalised residual stream, over all
            norms.
        channel_shares: [hidden_size] float32; each channel's share of that stream's mean square.
        directions: [hidden_size, hidden_size] float32; orthonormal columns. For every k, the first k columns span the
            best subspace for a residual stream of k elements (``leading_directions``).
        direction_shares: [hidden_size] float32; each direction's share of the mean square.
        token_shares: [vocab] float32; mean probability that the full model gives each token.
    """

    neurons: Tensor
    channels: Tensor
    channel_shares: Tensor
    directions: Tensor
    direction_shares: Tensor
    token_shares: Tensor

    @property
    def digest(self) -> str:
        """SHA-256 of all values, in hexadecimal."""
        return hashlib.sha256(b"".join(getattr(self, f.name).numpy().tobytes() for f in fields(self))).hexdigest()

    def save(self, file: Path, full_digest: str, text_digest: str | None = None) -> None:
        """Writes the scores to ``file``; it appears whole or not at all.

        Args:
            full_digest: Digest of the full model (``checkpoint_digest``).
            text_digest: Digest of the transcripts that were scored (``digest_of``).
        """
        tensors = {field.name: getattr(self, field.name).contiguous() for field in fields(self)}
        tensors["neurons"] = self.neurons.to(torch.int32)
        temporary = file.with_name(f".{file.name}.tmp")
        text = {} if text_digest is None else {_TEXT_DIGEST: text_digest}
        save_tensors(tensors, temporary, {_FULL_DIGEST: full_digest} | text)
        os.replace(temporary, file)

    @classmethod
    def load(cls, file: Path, full_digest: str, text_digest: str | None = None) -> Scores | None:
        """Reads scores; returns None if they belong to another checkpoint, or to other text.

        Args:
            text_digest: None accepts scores of any text.

        Raises:
            InvalidPair: ``file`` holds no scores.
        """
        try:
            with safe_open(file, "pt") as stored:
                metadata = stored.metadata() or {}
                if metadata.get(_FULL_DIGEST) != full_digest:
                    return None
                if text_digest is not None and metadata.get(_TEXT_DIGEST) != text_digest:
                    return None
                tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118  (not a mapping)
            return cls(**(tensors | {"neurons": tensors["neurons"].long()}))
        except (OSError, KeyError, TypeError, SafetensorError) as error:
            raise InvalidPair(f"{file}: no scores: {error}") from None


@torch.inference_mode()
def score(
    full: Weights, config: ModelConfig, packed: PackedTranscripts, sensitivity: Sensitivity, report: Report = silent
) -> Scores:
    """Runs the full model over ``packed``, layer by layer, and scores its parts on the answers.

    Args:
        full: Weights in float32 with the norms folded in (``fold_norms``).
        sensitivity: Dependence of the answers on the residual stream (``measure_sensitivity``).

    Raises:
        InvalidPair: a layer's output is not finite; the message names the layer.
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
    """Computes ``Scores.token_shares`` from the last norm's outputs, [answer rows, hidden]."""
    total = torch.zeros(len(head))
    for rows in normed.split(_ROWS_OF_LOGITS):
        total += (rows @ head.T).softmax(1).sum(0)
    return total / len(normed)


def leading_directions(covariance: Tensor, sensitivity: Tensor) -> Tensor:
    """Returns an orthonormal basis whose first k columns are, for every k, the best k measurements of a vector x.

    Let C be the second moment of x, S the sensitivity, and e the error of reconstructing x from the measurements by
    least squares. The best measurements minimise the mean of e' S e. They are the leading left singular vectors of
    S^1/2 C^1/2, times S^1/2. If S is the identity, they are the principal directions of C.

    Args:
        covariance, sensitivity: [n, n], symmetric; the sensitivity is positive definite.

    Returns:
        [n, n] float32
    """
    weight = matrix_sqrt(sensitivity)
    leading = torch.linalg.svd(weight @ matrix_sqrt(covariance)).U
    basis: Tensor = torch.linalg.qr(weight @ leading).Q
    return basis.float()


@dataclass(frozen=True, slots=True)
class PruningPlan:
    """The parts of a full model that a decoder keeps.

    Attributes:
        layers: Indices of the kept full-model layers, ascending: the decoder's layer map.
        neurons: Indices of the kept neurons for each of ``layers``, each [intermediate_size] int64, ascending.
        basis: [full hidden_size, hidden_size]; orthonormal columns, the kept directions of the residual stream.
        scale: Factor for the normalised stream of the decoder. RMSNorm divides by the mean square over the kept
            directions, which are larger than average; the factor restores the size that they had in the full model.
    """

    layers: tuple[int, ...]
    neurons: tuple[Tensor, ...]
    basis: Tensor
    scale: float = 1.0

    @property
    def reader_basis(self) -> Tensor:
        """Matrix that maps a projection's input side to the decoder's stream. [full hidden_size, hidden_size]"""
        return self.basis * self.scale


def make_pruning_plan(
    scores: Scores, *, hidden_size: int, intermediate_size: int, layers: Sequence[int], method: Method
) -> PruningPlan:
    """Chooses the parts that a decoder of the given size keeps. ``DecoderRecipe.sizes`` gives sizes that fit.

    Args:
        method: ``channel`` keeps the residual stream's largest channels; ``rotate`` keeps its leading directions.
    """
    full_hidden = len(scores.channels)
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
    """Computes ``PruningPlan.scale`` from the kept directions' shares of the mean square."""
    return float((shares.sum() * full_hidden / len(shares)).sqrt())


def slice_weights(full: Weights, plan: PruningPlan, head: HeadPlan | None = None) -> Weights:
    """Cuts a decoder out of ``full``, which has its norms folded in. Its gains are ones; its head is untied."""
    hidden = plan.basis.shape[1]
    layers = tuple(slice_layer(full.layers[i], kept, plan) for i, kept in zip(plan.layers, plan.neurons, strict=True))
    whole = full.head @ plan.reader_basis
    if head is not None:  # without a fit the covariance is unknown, so that all directions count alike
        whole = head.apply(whole, torch.eye(hidden))
    return Weights(full.embedding @ plan.basis, layers, torch.ones(hidden), whole)


def keep_neurons(gate_up: Tensor, neurons: Tensor) -> Tensor:
    """Selects ``neurons`` in both halves of a fused gate and up projection, or of its bias."""
    return torch.cat([part[neurons] for part in gate_up.chunk(2)])


def slice_layer(layer: LayerWeights, neurons: Tensor, plan: PruningPlan) -> LayerWeights:
    """Cuts one layer, as ``slice_weights`` does."""
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

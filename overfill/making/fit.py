"""Fit a pruned decoder to its full model without gradients.

The fit goes layer by layer. Ridge regression solves each projection for the output that the full model has there, from
the decoder's own inputs, which include the errors of earlier layers. The targets are:

* the full model's queries, keys, values, gates and ups, for the projections that read the residual stream;
* the difference between the full model's residual stream and the decoder's, for the output and down projections.

As in serving, the decoder computes answers on the full model's keys and values of the prompt and its own of the answer.
The stronger the ridge, the closer the result stays to the sliced weights.

Memory: 4 * hidden_size bytes per token for the full model's residual stream; for each answer token three times as much
again (full model, decoder, and the decoder's attention); and one layer's prompt KV. The normal equations have a fixed
size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import linear

from overfill.errors import InvalidPair, InvalidRequest
from overfill.making.head_plan import HeadPlan
from overfill.making.layerwise import LayerMath, PackedTranscripts, PromptKv, attend_answers, prompt_kv, run_full_layer
from overfill.making.prune import PruningPlan, keep_neurons, slice_layer
from overfill.making.ridge import Ridge
from overfill.model.config import ModelConfig
from overfill.model.loading import LayerWeights, Weights
from overfill.telemetry.progress import Report, silent

WRITER_PRIOR_ROWS = 3_000
READER_PRIOR_ROWS = 50
"""Strength of the prior on the sliced weights, in tokens: for projections that write to the residual stream, and for
those that read it. Found on SmolLM2-135M: on unseen text, writers get worse with a weaker prior, and readers with a
stronger one."""

_TOKENS_PER_INPUT = 2  # minimum number of answer tokens per input of the widest projection


def check_enough(packed: PackedTranscripts, config: ModelConfig, sizes: Mapping[str, int]) -> None:
    """Raises InvalidRequest when there are too few answer tokens to determine the widest projection.

    Args:
        config: The full model's config.
        sizes: The decoder's ``hidden_size`` and ``intermediate_size``.
    """
    widest = max(sizes["hidden_size"], config.num_heads * config.head_dim, sizes["intermediate_size"])
    if (tokens := len(packed.answers)) < (least := _TOKENS_PER_INPUT * widest):
        raise InvalidRequest(
            "calibration", f"has {tokens} answer tokens; fitting projections of {widest} inputs needs at least {least}"
        )


@torch.inference_mode()
def fit(
    full: Weights,
    config: ModelConfig,
    plan: PruningPlan,
    packed: PackedTranscripts,
    report: Report = silent,
    head: HeadPlan | None = None,
) -> Weights:
    """Returns the decoder that ``plan`` cuts out of ``full``, fitted on ``packed``.

    Args:
        full: Weights in float32 with the norms folded in (``fold_norms``).
        config: The full model's config.
        head: Split of the head into whole rows and rows that share a low-rank matrix. None keeps all rows whole.

    Returns:
        Weights in float32; all gains are ones, and the head is untied.

    Raises:
        InvalidPair: a layer's equations have no finite solution; the layer is named.
    """
    fitting = _LayerwiseFit(full, config, plan, packed)
    layers = []
    for done, (index, kept) in enumerate(zip(plan.layers, plan.neurons, strict=True)):
        layers.append(fitting.fit_layer(index, kept, after=(*plan.layers, config.num_layers)[done + 1]))
        report("Fitting", done + 1, len(plan.layers))
    whole, covariance = fitting.fit_head()
    if head is not None:
        whole = head.apply(whole, covariance)
    return Weights(full.embedding @ plan.basis, tuple(layers), torch.ones(plan.basis.shape[1]), whole)


@dataclass(slots=True)
class _FullLayerTargets:
    """Outputs of one full-model layer that the decoder's layer is fitted to or attends to.

    Attributes:
        before, middle: [answer rows, hidden]; the full model's residual stream before and after attention.
        prompts: KV of every prompt.
    """

    before: Tensor
    middle: Tensor
    prompts: PromptKv


class _LayerwiseFit:
    """State of the fit: the residual streams of the full model and of the decoder at the same depth."""

    def __init__(self, full: Weights, config: ModelConfig, plan: PruningPlan, packed: PackedTranscripts) -> None:
        self._full = full
        self._plan = plan
        self._basis = plan.basis
        # At full width, fitting the projections that read the stream changed nothing on unseen text.
        self._narrow = plan.basis.shape[1] < plan.basis.shape[0]
        self._packed = packed
        self._math = LayerMath(config, int(packed.positions.max()) + 1)
        self._full_depth = 0
        self._full_stream = full.embedding[packed.token_ids]  # [rows, full hidden]
        self._stream = full.embedding[packed.token_ids[packed.answers]] @ plan.basis  # [answer rows, hidden]

    def fit_layer(self, index: int, neurons: Tensor, after: int) -> LayerWeights:
        """Fits the decoder's copy of full layer ``index``; ``after`` is the next full layer that the decoder keeps."""
        self._advance_full(index)
        full_layer = self._run_full(index)
        self._advance_full(after)
        layer = slice_layer(self._full.layers[index], neurons, self._plan)
        if self._narrow:
            layer = replace(layer, qkv=self._fit_reader(full_layer.before, self._full.layers[index].qkv))
        attended = attend_answers(self._math, layer, self._packed, self._stream, full_layer.prompts)
        layer = replace(layer, o=self._fit_writer(attended, full_layer.middle, layer.o, layer.o_bias))
        self._add(attended, layer.o, layer.o_bias)
        if self._narrow:
            gate_up = keep_neurons(self._full.layers[index].gate_up, neurons)
            layer = replace(layer, gate_up=self._fit_reader(full_layer.middle, gate_up))
        outputs = torch.cat([self._math.neurons(layer, self._math.norm(x)) for x in self._pieces(self._stream)])
        target = self._full_stream[self._packed.answers]
        layer = replace(layer, down=self._fit_writer(outputs, target, layer.down, layer.down_bias))
        self._add(outputs, layer.down, layer.down_bias)
        for name in ("qkv", "o", "gate_up", "down"):
            if not getattr(layer, name).isfinite().all():
                raise InvalidPair(
                    f"fitting layer {index}: {name} is not finite; the checkpoint or the calibration text is damaged"
                )
        return layer

    def fit_head(self) -> tuple[Tensor, Tensor]:
        """Returns the fitted head, [vocab, hidden], and the covariance of its inputs, [hidden, hidden]."""
        ridge = self._reader(self._full_stream[self._packed.answers])
        return self._full.head @ ridge.solve(self._plan.reader_basis, READER_PRIOR_ROWS), ridge.covariance

    def _advance_full(self, depth: int) -> None:
        """Runs the full model up to the input of layer ``depth``."""
        while self._full_depth < depth:
            self._run_full(self._full_depth)

    def _run_full(self, index: int) -> _FullLayerTargets:
        packed, stream = self._packed, self._full_stream
        full_layer = _FullLayerTargets(stream[packed.answers], torch.empty(len(packed.answers), stream.shape[1]), [])
        for part in packed.parts:
            done = run_full_layer(self._math, self._full.layers[index], packed, part, stream[part.rows])
            stream[part.rows] = done.out
            full_layer.middle[part.answer_rows] = done.middle[part.answers]
            full_layer.prompts.extend(prompt_kv(done, part))
        self._full_depth = index + 1
        return full_layer

    def _fit_reader(self, full_stream: Tensor, matrix: Tensor) -> Tensor:
        """Fits a projection that reads the normalised stream. [out, full hidden] -> [out, hidden]

        Its targets are linear in the full model's normalised stream. One map from the decoder's stream to the full
        model's therefore serves all outputs.
        """
        return matrix @ self._reader(full_stream).solve(self._plan.reader_basis, READER_PRIOR_ROWS)

    def _reader(self, full_stream: Tensor) -> Ridge:
        ridge = Ridge(self._basis.shape[1], full_stream.shape[1])
        for ours, theirs in zip(self._pieces(self._stream), self._pieces(full_stream), strict=True):
            ridge.add(self._math.norm(ours), self._math.norm(theirs))
        return ridge

    def _fit_writer(self, inputs: Tensor, full_stream: Tensor, start: Tensor, bias: Tensor | None) -> Tensor:
        """Fits a projection that writes to the stream; its target is the full model's stream minus the decoder's."""
        ridge = Ridge(inputs.shape[1], self._basis.shape[1])
        for x, ours, theirs in zip(*map(self._pieces, (inputs, self._stream, full_stream)), strict=True):
            lacking = theirs @ self._basis - ours
            ridge.add(x, lacking if bias is None else lacking - bias)
        return ridge.solve(start, WRITER_PRIOR_ROWS)

    def _add(self, inputs: Tensor, matrix: Tensor, bias: Tensor | None) -> None:
        for rows, x in zip(self._pieces(self._stream), self._pieces(inputs), strict=True):
            rows += linear(x, matrix, bias)

    def _pieces(self, answers: Tensor) -> list[Tensor]:
        """Splits [answer rows, …] into one view per part."""
        return [answers[part.answer_rows] for part in self._packed.parts]

"""Choose the layers that a decoder keeps, by the measured damage of leaving each one out."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import kl_div, linear

from overfill.making.layerwise import LayerMath, PackedTranscripts, PromptKv, attend_answers, prompt_kv, run_full_layer
from overfill.model.config import ModelConfig
from overfill.model.loading import Weights
from overfill.telemetry.progress import Report, silent


@torch.inference_mode()
def choose_layers(
    full: Weights, config: ModelConfig, packed: PackedTranscripts, keep: int, report: Report = silent
) -> list[int]:
    """Returns the ``keep`` layers of ``full`` that a decoder needs most, ascending.

    Removes one layer at a time, greedily: the layer whose removal changes the answers' next-token distributions least
    (mean forward KL from the full model). The whole full model always reads the prompts.

    Args:
        full: Weights in float32 with the norms folded in.
        packed: Transcripts with a few hundred answer tokens. Memory and time grow with them and with the layers.
    """
    kept = list(range(config.num_layers))
    if keep == len(kept):
        return kept
    trial = _LayerRemovalTrial(full, config, packed)
    for removed in range(config.num_layers - keep):
        damage = {layer: trial.damage([k for k in kept if k != layer]) for layer in kept}
        kept.remove(min(damage, key=damage.__getitem__))
        report("Measuring layers", removed + 1, config.num_layers - keep)
    return kept


class _LayerRemovalTrial:
    """Runs the full model without some layers over the answers, on the full model's KV of the prompts."""

    def __init__(self, full: Weights, config: ModelConfig, packed: PackedTranscripts) -> None:
        self._full = full
        self._packed = packed
        self._math = LayerMath(config, int(packed.positions.max()) + 1)
        self._prompts: list[PromptKv] = []
        stream = full.embedding[packed.token_ids]
        for layer in full.layers:
            prompts = []
            for part in packed.parts:
                done = run_full_layer(self._math, layer, packed, part, stream[part.rows])
                stream[part.rows] = done.out
                prompts += prompt_kv(done, part)
            self._prompts.append(prompts)
        self._expected = self._log_probabilities(stream[packed.answers])

    def damage(self, layers: list[int]) -> float:
        """Returns the mean KL, in nats, when only ``layers`` compute the answers."""
        packed, math = self._packed, self._math
        stream = self._full.embedding[packed.token_ids[packed.answers]]
        for index in layers:
            layer = self._full.layers[index]
            attended = attend_answers(math, layer, packed, stream, self._prompts[index])
            stream = stream + linear(attended, layer.o, layer.o_bias)
            neurons = math.neurons(layer, math.norm(stream))
            stream = stream + linear(neurons, layer.down, layer.down_bias)
        got = self._log_probabilities(stream)
        return float(kl_div(got, self._expected, reduction="batchmean", log_target=True))

    def _log_probabilities(self, stream: Tensor) -> Tensor:
        return linear(self._math.norm(stream), self._full.head).log_softmax(-1)

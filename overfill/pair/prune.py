"""Smaller MLPs: which neurons of each layer matter, and a checkpoint that keeps only those.

Scoring and slicing are apart: scores are computed once, saved, looked at, and sliced at any size. Attention
and every width that the KV cache depends on stay as they are. Which text to score on is ``calibrate``'s.

The score of neuron j is its mean absolute activation times the norm of the column of the down projection
that it feeds: the size of what it adds to the residual stream. (As in Wanda, arXiv 2306.11695, summed over
a whole column, so that neurons, not single weights, go.)
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from overfill.errors import InvalidPair
from overfill.model.config import ModelConfig
from overfill.pair.checkpoint import copy_companions, write_json, write_weights
from overfill.pair.digest import list_tensors
from overfill.pair.plain import load_plain
from overfill.pair.progress import Report, silent


@dataclass(frozen=True, slots=True)
class Transcript:
    """A prompt and the answer to it; scores count the positions that a decoder computes."""

    token_ids: tuple[int, ...]
    answer_start: int


@dataclass(frozen=True, slots=True)
class Scores:
    """Importance of every MLP neuron.

    Attributes:
        values: [num_layers, intermediate_size] float32, non-negative; comparable within a layer.
    """

    values: torch.Tensor

    def save(self, file: Path) -> None:
        save_file({"mlp": self.values}, file)

    @classmethod
    def load(cls, file: Path) -> Scores:
        """Raises InvalidPair when ``file`` is missing or holds something else."""
        try:
            return cls(load_file(file)["mlp"])
        except (OSError, KeyError, SafetensorError) as error:
            raise InvalidPair(f"{file}: no MLP scores: {error}") from None

    def kept(self, layer: int, count: int) -> torch.Tensor:
        """The ``count`` most important neurons of ``layer``, in ascending order. [count] int64."""
        return self.values[layer].topk(count).indices.sort().values


@torch.inference_mode()
def score_mlp(model_folder: Path, token_batches: Sequence[Sequence[Transcript]], report: Report = silent) -> Scores:
    """Scores the MLP neurons of the checkpoint in ``model_folder`` on the answers in ``token_batches``.

    Transcripts of one batch run together, padded on the right. Runs in float32.

    Raises:
        ValueError: there are no answer tokens.
    """
    model = load_plain(model_folder)
    projections: list[nn.Linear] = [layer.mlp.down_proj for layer in model.model.layers]
    sums = torch.zeros(len(projections), projections[0].in_features, dtype=torch.float64)
    is_answer = torch.empty(0)  # [batch, tokens] bool, of the batch that is running

    def recorder(layer: int) -> Callable[[nn.Module, tuple[torch.Tensor]], None]:
        def record(module: nn.Module, inputs: tuple[torch.Tensor]) -> None:
            sums[layer] += inputs[0][is_answer].abs().sum(0).double()

        return record

    hooks = [p.register_forward_pre_hook(recorder(i)) for i, p in enumerate(projections)]
    counted = 0
    try:
        for index, batch in enumerate(token_batches):
            longest = max(len(t.token_ids) for t in batch)
            token_ids = torch.zeros(len(batch), longest, dtype=torch.int64)
            is_token = torch.zeros(len(batch), longest, dtype=torch.int64)
            is_answer = torch.zeros(len(batch), longest, dtype=torch.bool)
            for row, transcript in enumerate(batch):
                end = len(transcript.token_ids)
                token_ids[row, :end] = torch.tensor(transcript.token_ids)
                is_token[row, :end] = 1
                is_answer[row, transcript.answer_start : end] = True
            counted += int(is_answer.sum())
            model.model(input_ids=token_ids, attention_mask=is_token, use_cache=False)
            report("Scoring neurons", index + 1, len(token_batches))
    finally:
        for hook in hooks:
            hook.remove()
    if not counted:
        raise ValueError("no answer tokens to score on")
    norms = torch.stack([p.weight.norm(dim=0) for p in projections])
    return Scores((sums / counted).float() * norms)


def check_size(config: ModelConfig, intermediate_size: int) -> None:
    """Raises InvalidPair unless an MLP of ``config`` can be cut to ``intermediate_size``."""
    widest = config.intermediate_size
    if not 1 <= intermediate_size <= widest:
        raise InvalidPair(f"intermediate_size must be in 1..{widest}, got {intermediate_size}")


def slice_mlp(full_folder: Path, scores: Scores, intermediate_size: int, out: Path) -> None:
    """Writes to the existing folder ``out`` the checkpoint in ``full_folder`` with smaller MLPs.

    Each layer keeps its ``intermediate_size`` best neurons, in their old order; every other tensor, and the
    element type, is as it was.

    Raises:
        InvalidPair: the scores are not of this model, or ``intermediate_size`` is out of range.
    """
    config = ModelConfig.load(full_folder)
    expected = (config.num_layers, config.intermediate_size)
    if tuple(scores.values.shape) != expected:
        raise InvalidPair(f"scores are {tuple(scores.values.shape)}; {full_folder} needs {expected}")
    check_size(config, intermediate_size)
    tensors = {}
    for stored in list_tensors(full_folder):
        with safe_open(stored.file, framework="pt") as file:
            tensor = file.get_tensor(stored.name)
        if ".mlp." in stored.name:
            layer = int(stored.name.split(".layers.")[1].split(".")[0])
            kept = scores.kept(layer, intermediate_size)
            if "gate_proj" in stored.name or "up_proj" in stored.name:
                tensor = tensor[kept]
            elif stored.name.endswith("down_proj.weight"):
                tensor = tensor[:, kept]
        tensors[stored.name] = tensor
    write_weights(out, tensors)
    hf_config = json.loads((full_folder / "config.json").read_text(encoding="utf-8"))
    write_json(out / "config.json", hf_config | {"intermediate_size": intermediate_size})
    copy_companions(full_folder, out)

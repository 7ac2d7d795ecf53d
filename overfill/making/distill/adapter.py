"""LoRA adapters in training (arXiv 2106.09685): PEFT's modules in the decoder, and PEFT's files. Knows no loss."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from overfill.making.atomic import atomic_folder
from overfill.making.checkpoint import save_tensors, write_json
from overfill.making.distill.model import PackedModel
from overfill.making.distill.student import HeldOutResult
from overfill.model.adapter import WEIGHTS, Projection
from overfill.model.manifest import Pair
from overfill.pair.adapters import write_record
from overfill.process.extras import needs

_PREFIX = "base_model.model."  # PEFT's files name a tensor by its module's path in PEFT's own model
_PROCESS_BYTES = 400 << 20  # Python, torch, and the loss's buffers


def add_adapter(decoder: PackedModel, rank: int, seed: int) -> None:
    """Freezes ``decoder`` and adds PEFT's LoRA modules to its layers' projections, with scale 1.

    Raises:
        MissingExtra: the package peft is not installed.
    """
    with needs("pairs", "training an adapter"):
        from peft import LoraConfig, inject_adapter_in_model

    targets = list(get_args(Projection))
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=targets, task_type="CAUSAL_LM", inference_mode=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(config, decoder)


def is_factor(name: str) -> bool:
    """True for a parameter that is a factor of a low-rank product."""
    return name.endswith((".up", ".down")) or ".lora_" in name


def peak_bytes(decoder: PackedModel, full: PackedModel, rows: int) -> int:
    """Estimates the memory of a run with an adapter at its peak.

    Args:
        rows: Largest number of tokens of a forward pass.
    """
    weights = {p.data_ptr(): p.nbytes for model in (decoder, full) for p in model.parameters() if not p.requires_grad}
    trained = sum(p.numel() for p in decoder.trained.values())
    config, width = decoder.config, decoder.model.embed_tokens.weight.element_size()
    # What a layer saves for the backward pass: inputs of its projections, twice, and what lies between them.
    saved = 12 * config.hidden_size + 6 * config.num_heads * config.head_dim + 8 * config.intermediate_size
    return _PROCESS_BYTES + sum(weights.values()) + 16 * trained + rows * config.num_layers * saved * width


class BestAdapter:
    """The adapter with the lowest held-out loss so far, in a run's folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def offer(self, decoder: PackedModel, result: HeldOutResult, loss: float, step: int) -> None:
        """Keeps the adapter of ``decoder`` unless an earlier one has a lower ``loss``."""
        if (best := self.facts()) and (best["loss"], best["step"]) <= (loss, step):
            return
        with atomic_folder(self.folder) as folder:
            save_tensors(_stored(decoder), folder / WEIGHTS, {"format": "pt"})
            write_json(folder / "best.json", {"step": step, "loss": loss, "held_out": result.as_dict()})

    def facts(self) -> dict[str, Any]:
        """Returns step, loss and result of the best adapter; empty before the first one."""
        file = self.folder / "best.json"
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        return found


def _stored(decoder: PackedModel) -> dict[str, Tensor]:
    from peft import get_peft_model_state_dict

    tensors: Mapping[str, Tensor] = get_peft_model_state_dict(decoder)
    return {_PREFIX + name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def write_adapter(
    out: Path,
    pair: Pair,
    decoder: PackedModel,
    best: BestAdapter,
    facts: Mapping[str, Any],
    *,
    tail_tokens: int,
    own_prefill: bool,
    extras: Sequence[Path],
) -> None:
    """Writes the folder ``out``: the best adapter in PEFT's files, our record, and ``extras`` in ``training/``.

    Args:
        pair: Pair on whose decoder the adapter was trained.
        facts: Facts of the training, for the record.
        tail_tokens, own_prefill: As in ``AdapterRecord``.
    """
    configs: Any = decoder.peft_config
    config = configs["default"]
    config.base_model_name_or_path, config.inference_mode = str(pair.decoder_path), True
    with atomic_folder(out) as folder:
        config.save_pretrained(folder)
        shutil.copyfile(best.folder / WEIGHTS, folder / WEIGHTS)
        training = {**facts, "best": best.facts()}
        write_record(folder, pair, tail_tokens=tail_tokens, own_prefill=own_prefill, training=training)
        (folder / "training").mkdir()
        for file in extras:
            shutil.copyfile(file, folder / "training" / file.name)

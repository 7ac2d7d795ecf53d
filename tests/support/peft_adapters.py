"""Adapters with random weights that change a decoder's answers, made by PEFT or in its format."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from overfill.making.tiny import make_random_adapter
from overfill.model.manifest import Pair
from overfill.pair.adapters import add_adapter


def save_peft(pair: Pair, folder: Path, *, seed: int = 0, dtype: torch.dtype = torch.float32, **lora: Any) -> Path:
    """Has PEFT make a LoRA of the pair's decoder and save it to ``folder``, which is returned.

    Args:
        lora: arguments of ``LoraConfig``; by default rank 4 on all projections.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT reads an attribute that transformers 5 renames
        from peft import LoraConfig, get_peft_model

        model = AutoModelForCausalLM.from_pretrained(pair.decoder_path, dtype=torch.float32)
        config: Any = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | lora
        adapted = get_peft_model(model, LoraConfig(**config))
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.data = torch.randn(parameter.shape, generator=generator).mul(0.1).to(dtype)
        adapted.save_pretrained(folder)
    return folder


def load_peft(pair: Pair, folder: Path) -> Any:
    """Has PEFT load an adapter onto the pair's decoder."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        from peft import PeftModel

        return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(pair.decoder_path), folder).eval()


def add_tiny_adapter(pair: Pair, directory: Path, name: str, *, seed: int = 0, tail_tokens: int = 0) -> Path:
    """Adds a random adapter of the pair's decoder to ``directory``; returns its folder. Does not import PEFT."""
    source = make_random_adapter(directory.with_name(f"{directory.name}-{name}"), pair.decoder_config, seed)
    add_adapter(directory, name, source, pair, tail_tokens=tail_tokens, own_prefill=False)
    return directory / name

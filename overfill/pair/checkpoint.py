"""Writing ordinary Hugging Face checkpoints, without a model object."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

# What makes a checkpoint folder usable besides its weights and config.json.
COMPANION_FILES = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
)


def write_weights(folder: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """``folder/model.safetensors``, which plain transformers loads."""
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, folder / "model.safetensors", metadata={"format": "pt"})


def write_json(file: Path, value: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def copy_companions(source: Path, target: Path) -> None:
    """Tokenizer, chat template and generation defaults of ``source``, as far as it has them."""
    for name in COMPANION_FILES:
        if (source / name).exists():
            shutil.copyfile(source / name, target / name)

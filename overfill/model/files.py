"""Finds a checkpoint's safetensors files and checks their tensors against its config before any is read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from overfill.errors import InvalidPair, UnsupportedModel
from overfill.model.config import ModelConfig

HEAD = "lm_head.weight"
EMBEDDING = "model.embed_tokens.weight"
_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_FLOATS = ("F32", "BF16", "F16")


def checked_files(folder: Path, config: ModelConfig, expected: Mapping[str, torch.Size]) -> list[Path]:
    """Lists the files of the checkpoint in ``folder`` after checking their tensors' names, shapes and dtypes.

    Args:
        expected: shape of each tensor, by name.

    Raises:
        InvalidPair: a file or tensor is missing, damaged, surplus, or has another shape; the message names it.
        UnsupportedModel: a tensor's dtype is not a supported float.
    """
    files = _tensor_files(folder)
    seen: set[str] = set()
    for path in files:
        with open_tensors(path) as file:
            for name in file.keys():  # noqa: SIM118
                if _is_buffer(name):
                    continue
                if name in seen:
                    raise InvalidPair(f"{folder}: two files hold tensor {name}")
                seen.add(name)
                tied_head = name == HEAD and config.tie_embeddings
                shape = expected.get(EMBEDDING if tied_head else name)
                if shape is None:
                    raise InvalidPair(f"{path}: tensor {name} is not part of a {config.model_type} with this config")
                header = file.get_slice(name)
                if header.get_dtype() not in _FLOATS:
                    raise UnsupportedModel(f"{path}: tensor {name} is {header.get_dtype()}; supported are {_FLOATS}")
                if tuple(header.get_shape()) != tuple(shape):
                    shapes = f"{tuple(header.get_shape())}; the config implies {tuple(shape)}"
                    raise InvalidPair(f"{path}: tensor {name} has shape {shapes}")
    missing = [name for name in expected if name not in seen]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise InvalidPair(f"{folder}: tensor {missing[0]}{more} is missing")
    return files


def _tensor_files(folder: Path) -> list[Path]:
    index = folder / _INDEX
    if (folder / _SINGLE).exists():
        return [folder / _SINGLE]
    if not index.exists():
        raise InvalidPair(f"{folder} has neither {_SINGLE} nor {_INDEX}")
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise InvalidPair(f"{index} is damaged: {error!r}") from None
    for name in names:
        if Path(name).name != name or not (folder / name).exists():
            raise InvalidPair(f"{index} lists {name!r}, which is not in the folder")
    return [folder / name for name in names]


def check_tied_head(files: list[Path], embedding: Tensor) -> None:
    """Raises InvalidPair if a file also stores the tied head and it differs from the embedding."""
    for path in files:
        with open_tensors(path) as file:
            if HEAD in file.keys():  # noqa: SIM118
                head = file.get_tensor(HEAD).to(embedding.device, embedding.dtype)
                if not torch.equal(head, embedding):
                    raise InvalidPair(f"{path}: the config ties the embeddings, but {HEAD} differs from {EMBEDDING}")


def open_tensors(path: Path) -> Any:
    """Opens a safetensors file; raises InvalidPair if it cannot be read."""
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise InvalidPair(f"{path} cannot be read: {error}") from None


def _is_buffer(name: str) -> bool:
    """True for RoPE's frequencies, which old checkpoints store although they follow from the config."""
    return name.endswith("rotary_emb.inv_freq")

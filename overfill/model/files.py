"""Finds a checkpoint's safetensors files and checks their tensors against its config before any is read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from overfill.errors import InvalidPair, UnsupportedModel
from overfill.model.config import ModelConfig
from overfill.model.digest import StoredTensor, checkpoint_files, list_tensors

HEAD = "lm_head.weight"
EMBEDDING = "model.embed_tokens.weight"
_FLOATS = ("F32", "BF16", "F16")


def checked_files(folder: Path, config: ModelConfig, expected: Mapping[str, torch.Size]) -> list[Path]:
    """Lists the files of the checkpoint in ``folder`` after checking their tensors' names, shapes and dtypes.

    Args:
        expected: shape of each tensor, by name.

    Raises:
        InvalidPair: a file or tensor is missing, damaged, surplus, or has another shape; the message names it.
        UnsupportedModel: the weights are quantised in the files, or a tensor's dtype is not a supported float.
    """
    config.check_plain(folder)
    check_tensors(list_tensors(folder), config, expected, folder)
    return checkpoint_files(folder)


def check_tensors(
    tensors: Iterable[StoredTensor], config: ModelConfig, expected: Mapping[str, torch.Size], folder: Path
) -> None:
    """Checks names, shapes and dtypes of a checkpoint's tensors.

    A quantised format may store a matrix as several tensors with names of their own, such as ``qweight`` and
    ``scales``. In such a checkpoint, only tensors with expected names have their shapes checked, and no dtype is
    checked. A matrix is missing if no tensor of its module is there.

    Args:
        expected: shape of each tensor, by name.
        folder: the checkpoint's folder, for messages.

    Raises:
        InvalidPair: a tensor is missing, surplus, or has another shape; the message names it.
        UnsupportedModel: a tensor of a plain checkpoint is not a supported float.
    """
    plain = config.weight_format == "plain"
    seen: set[str] = set()
    for tensor in tensors:
        if is_buffer(tensor.name):
            continue
        seen.add(tensor.name if plain else tensor.name.rpartition(".")[0])
        tied_head = tensor.name == HEAD and config.tie_embeddings
        shape = expected.get(EMBEDDING if tied_head else tensor.name)
        if shape is None:
            if not plain:
                continue
            raise InvalidPair(
                f"{tensor.file}: tensor {tensor.name} is not part of a {config.model_type} with this config"
            )
        if plain and tensor.dtype not in _FLOATS:
            raise UnsupportedModel(
                f"{tensor.file}: tensor {tensor.name} is {tensor.dtype}; supported are {', '.join(_FLOATS)}"
            )
        if tensor.shape != tuple(shape):
            raise InvalidPair(
                f"{tensor.file}: tensor {tensor.name} has shape {tensor.shape}; the config implies {tuple(shape)}"
            )
    missing = [name for name in expected if (name if plain else name.rpartition(".")[0]) not in seen]
    if missing:
        what = f"{missing[0]} is" if len(missing) == 1 else f"{missing[0]} and {len(missing) - 1} more are"
        raise InvalidPair(f"{folder}: tensor {what} missing")


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


def is_buffer(name: str) -> bool:
    """True for RoPE's frequencies, which old checkpoints store although they follow from the config."""
    return name.endswith("rotary_emb.inv_freq")

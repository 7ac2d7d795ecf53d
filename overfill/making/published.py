"""Reads a checkpoint as somebody published it: headers and weights, whole or in shards."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from overfill.errors import InvalidPair, UnsupportedModel
from overfill.model.config import read_json
from overfill.model.digest import checkpoint_files, list_tensors
from overfill.model.files import EMBEDDING, HEAD, check_tied_head


class PublishedCheckpoint:
    """A checkpoint folder whose headers have been read.

    Attributes:
        folder: The folder.
        hf_config: Content of config.json; None if there is no such file.
        files: The files with weights.
        tensors: Headers of all tensors, by name.
    """

    def __init__(self, folder: Path) -> None:
        """Reads the headers of the checkpoint in ``folder``.

        Raises:
            InvalidPair: a file is missing or damaged; the message names it.
            UnsupportedModel: the folder has weights in GGUF, for MLX or in torch files.
        """
        self.folder = folder
        config = folder / "config.json"
        self.hf_config = read_json(config) if config.exists() else None
        _refuse_other_formats(folder, self.hf_config)
        self.files = checkpoint_files(folder)
        self._states = {file: _state(file) for file in self._all_files()}
        self.tensors = {header.name: header for header in list_tensors(folder)}

    def read(self, name: str) -> Tensor:
        """Returns one tensor as it is stored."""
        file = self.tensors[name].file
        try:
            with safe_open(file, framework="pt") as opened:
                tensor: Tensor = opened.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise InvalidPair(f"{file}: tensor {name} cannot be read: {error}") from None
        return tensor

    def has_equal(self, one: str, other: str) -> bool:
        """True if two tensors have the same values. Reads only the first rows of tensors that differ there."""
        if self.tensors[one].shape != self.tensors[other].shape:
            return False
        left, right = self.read(one), self.read(other)
        wide = left.dtype if left.dtype == right.dtype else torch.float32
        return all(torch.equal(left[rows].to(wide), right[rows].to(wide)) for rows in (slice(8), slice(None)))

    def check_tied_head(self) -> None:
        """Raises InvalidPair if a head is stored and is not the embedding; the config must tie the two."""
        if {HEAD, EMBEDDING} <= self.tensors.keys():  # a quantised embedding has another name
            check_tied_head(self.files, self.read(EMBEDDING))

    def check_unchanged(self) -> None:
        """Raises InvalidPair if a file has changed, appeared or gone since the headers were read."""
        try:
            changed = [file for file in self._all_files() if _state(file) != self._states.get(file)]
        except FileNotFoundError as error:
            changed = [Path(error.filename)]
        if changed:
            raise InvalidPair(
                f"{changed[0]} changed while it was read: something is still writing {self.folder}. "
                "Import it when it is complete"
            )

    def _all_files(self) -> list[Path]:
        return [*self.files, *(file for file in self.folder.glob("*.json") if file.is_file())]


def _state(file: Path) -> tuple[int, int, int]:
    """Size, modification time and inode of a file, by which a change is noticed."""
    status = file.stat()
    return status.st_size, status.st_mtime_ns, status.st_ino


def _has_safetensors(folder: Path) -> bool:
    # Links to nothing count, so that `checkpoint_files` names them.
    return any(os.path.lexists(folder / name) for name in ("model.safetensors", "model.safetensors.index.json"))


def _refuse_other_formats(folder: Path, hf_config: Mapping[str, Any] | None) -> None:
    for name in [] if _has_safetensors(folder) else sorted(file.name for file in folder.glob("*")):
        if name.endswith((".incomplete", ".tmp", ".part")):
            raise InvalidPair(f"{folder / name} is being written; give the checkpoint when it is complete")
        if name.endswith(".gguf"):
            raise UnsupportedModel(
                f"{folder / name}: GGUF is not supported. Give the Hugging Face checkpoint from which it was made"
            )
        if name.startswith("pytorch_model"):
            raise UnsupportedModel(
                f"{folder / name}: torch's files are pickles and are not supported. Save the weights as safetensors"
            )
    options = (hf_config or {}).get("quantization")
    of_mlx = isinstance(options, Mapping) and "group_size" in options
    if of_mlx or _safetensors_format(folder) == "mlx":
        raise UnsupportedModel(
            f"{folder}: MLX weights are not supported. Give the Hugging Face checkpoint from which they were made"
        )


def _safetensors_format(folder: Path) -> str | None:
    if not _has_safetensors(folder):
        return None
    try:
        with safe_open(checkpoint_files(folder)[0], framework="pt") as file:
            return (file.metadata() or {}).get("format")
    except (SafetensorError, OSError):
        return None  # `list_tensors` says what is wrong with the file

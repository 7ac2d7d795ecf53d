"""Read a checkpoint as somebody published it: headers and weights, safetensors or torch files, whole or in shards.

Torch files are pickles. They are read with ``weights_only=True``, so that nothing in them is run. They are mapped into
memory, so that only the tensors that are used are read; files of torch before 1.6 cannot be mapped and are read whole.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from overfill.errors import InvalidPair, UnsupportedModel
from overfill.making.checkpoint import TORCH_DTYPES
from overfill.model.config import check_link, read_json
from overfill.model.digest import (
    StoredTensor,
    check_not_pointer,
    checkpoint_files,
    indexed_files,
    list_tensors,
)
from overfill.model.files import EMBEDDING, HEAD

_DTYPE_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}
_TORCH_SINGLE, _TORCH_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"


class PublishedCheckpoint:
    """A checkpoint folder whose headers have been read.

    Attributes:
        folder: The folder.
        hf_config: Content of config.json; None if there is no such file.
        files: The files with weights.
        tensors: Headers of all tensors, by name.
        in_safetensors: True if the files are safetensors, False if they are torch files.
    """

    def __init__(self, folder: Path) -> None:
        """Reads the headers of the checkpoint in ``folder``.

        Raises:
            InvalidPair: a file is missing, damaged or holds more than weights; the message names it.
            UnsupportedModel: the folder has weights in GGUF or for MLX.
        """
        self.folder = folder
        config = folder / "config.json"
        self.hf_config = read_json(config) if config.exists() else None
        _refuse_other_formats(folder, self.hf_config)
        self._mapped: dict[str, Tensor] = {}
        self.in_safetensors = _has_safetensors(folder)
        self.files = checkpoint_files(folder) if self.in_safetensors else _torch_files(folder)
        self._states = {file: _state(file) for file in self._all_files()}
        if self.in_safetensors:
            found = list_tensors(folder)
        else:
            found = [header for file in self.files for header in self._map(file)]
        self.tensors = {header.name: header for header in found}

    def read(self, name: str) -> Tensor:
        """Returns one tensor as it is stored. Tensors of torch files are mapped."""
        if not self.in_safetensors:
            return self._mapped[name]
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
        if left.data_ptr() == right.data_ptr():  # tied weights in a torch file
            return True
        wide = left.dtype if left.dtype == right.dtype else torch.float32
        return all(torch.equal(left[rows].to(wide), right[rows].to(wide)) for rows in (slice(8), slice(None)))

    def check_tied_head(self) -> None:
        """Raises InvalidPair if a head is stored and is not the embedding, although the config ties them."""
        if HEAD in self.tensors and EMBEDDING in self.tensors and not self.has_equal(HEAD, EMBEDDING):
            raise InvalidPair(
                f"{self.tensors[HEAD].file}: the config ties the embeddings, but {HEAD} differs from {EMBEDDING}"
            )

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

    def _map(self, file: Path) -> Iterable[StoredTensor]:
        for name, tensor in load_torch_file(file).items():
            if name in self._mapped:
                raise InvalidPair(f"{file}: tensor {name} is also in another file")
            self._mapped[name] = tensor
            dtype = _DTYPE_NAMES.get(tensor.dtype, str(tensor.dtype))
            yield StoredTensor(name, dtype, tuple(tensor.shape), file, 0, tensor.numel() * tensor.element_size())


def load_torch_file(file: Path) -> Mapping[str, Tensor]:
    """Maps the tensors of a torch file of weights into memory; reads a file of torch before 1.6 whole.

    Raises:
        InvalidPair: the file is damaged, or holds anything but named tensors.
    """
    try:
        try:
            content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:
            if "mmap" not in str(error):
                raise
            content = torch.load(file, map_location="cpu", weights_only=True)  # the format before torch 1.6
    except Exception as error:  # a damaged pickle raises anything
        check_not_pointer(file)
        if (wanted := re.search(r"GLOBAL ([\w.]+)", str(error))) is not None:
            raise InvalidPair(
                f"{file}: holds more than weights (it asks for {wanted[1]}), so it was not loaded. "
                "Save the weights as safetensors"
            ) from None
        raise InvalidPair(f"{file}: cannot be read as a torch file: {_first_sentence(error)}") from None
    if not isinstance(content, Mapping):
        raise InvalidPair(f"{file}: holds a {type(content).__name__}, not tensors by name")
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise InvalidPair(f"{file}: entry {name!r} is not a named tensor; a file of weights alone is needed")
        if value.layout != torch.strided:
            raise InvalidPair(f"{file}: tensor {name} is stored as {value.layout}; only dense tensors can be read")
    return content


def _state(file: Path) -> tuple[int, int, int]:
    """Size, modification time and inode of a file, by which a change is noticed."""
    status = file.stat()
    return status.st_size, status.st_mtime_ns, status.st_ino


def _has_safetensors(folder: Path) -> bool:
    # Links to nothing count, so that `checkpoint_files` names them.
    return any(os.path.lexists(folder / name) for name in ("model.safetensors", "model.safetensors.index.json"))


def _torch_files(folder: Path) -> list[Path]:
    check_link(folder / _TORCH_SINGLE)
    if (folder / _TORCH_SINGLE).exists():
        return [folder / _TORCH_SINGLE]
    if not (folder / _TORCH_INDEX).exists():
        unfinished = [name for name in sorted(os.listdir(folder)) if name.endswith((".incomplete", ".tmp", ".part"))]
        hint = f"; {unfinished[0]} is being written" if unfinished else ""
        raise InvalidPair(f"{folder} has no model.safetensors and no {_TORCH_SINGLE}, nor an index of either{hint}")
    return indexed_files(folder / _TORCH_INDEX)


def _refuse_other_formats(folder: Path, hf_config: Mapping[str, Any] | None) -> None:
    if not _has_safetensors(folder) and (gguf := sorted(folder.glob("*.gguf"))):
        raise UnsupportedModel(
            f"{gguf[0]}: GGUF is not supported. Give the Hugging Face checkpoint from which it was made"
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


def _first_sentence(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].split(". ")[0]

"""Writes ordinary Hugging Face checkpoints without a model object."""

from __future__ import annotations

import json
import os
import shutil
import stat
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file  # noqa: TID251

from overfill.model.config import ModelConfig
from overfill.model.digest import list_tensors
from overfill.model.files import EMBEDDING, HEAD
from overfill.model.loading import Weights, state_dict
from overfill.pair.hf_config import decoder_config

# Files that a usable checkpoint folder has besides its weights and config.json.
COMPANION_FILES = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
)

_STORED = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""torch's dtypes, by their names in safetensors files."""


def stored_dtype(folder: Path) -> torch.dtype:
    """Returns the dtype of the checkpoint's tensors in its files; the head may have a wider one."""
    return _STORED[next(t for t in list_tensors(folder) if t.name == EMBEDDING).dtype]


def link_relatively(link: Path, target: Path) -> None:
    """Makes ``link`` a relative link to ``target``, so that both can be moved together."""
    # realpath, because the system resolves a relative link against the real folder that holds it.
    link.symlink_to(os.path.relpath(os.path.realpath(target), os.path.realpath(link.parent)))


def write_weights(folder: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Writes ``folder/model.safetensors`` in the form that plain transformers loads."""
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_tensors(contiguous, folder / "model.safetensors", {"format": "pt"})


def save_tensors(tensors: Mapping[str, torch.Tensor], file: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Writes a safetensors file whose mode follows the umask; safetensors itself always writes 0600."""
    file.touch()
    mode = stat.S_IMODE(file.stat().st_mode)
    save_file(dict(tensors), file, metadata=None if metadata is None else dict(metadata))
    file.chmod(mode)


def write_decoder(
    folder: Path,
    full: Path,
    weights: Weights,
    head: Mapping[str, Any] | None = None,
    correct: Callable[[Mapping[str, torch.Tensor], ModelConfig], None] | None = None,
) -> None:
    """Writes a checkpoint of ``weights`` to the existing ``folder``; copies everything else from ``full``.

    Tensors get the dtype of the full model's files. A head in two parts (``head``, as in ``decoder_config``) is written
    in float32, because rounding would raise the rank of its low-rank part. ``correct`` may change the tensors before
    they are rounded.

    Raises:
        UnsupportedModel: no transformers class runs a model of these sizes.
    """
    full_config = json.loads((full / "config.json").read_text(encoding="utf-8"))
    hf_config = decoder_config(
        full_config,
        hidden_size=weights.embedding.shape[1],
        intermediate_size=weights.layers[0].down.shape[1],
        num_layers=len(weights.layers),
        tie_word_embeddings=weights.head is weights.embedding,
        head=head,
    )
    write_json(folder / "config.json", hf_config)
    copy_companions(full, folder)
    dtype = stored_dtype(full)
    config = ModelConfig.from_dict(hf_config)
    tensors = state_dict(config, weights)
    if correct is not None:
        correct(tensors, config)
    exact = {HEAD} if head is not None else set()
    write_weights(
        folder,
        {name: tensor.to(torch.float32 if name in exact else dtype, copy=True) for name, tensor in tensors.items()},
    )


def write_json(file: Path, value: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def copy_companions(source: Path, target: Path) -> None:
    """Copies the tokenizer, chat template and generation defaults that ``source`` has."""
    for name in COMPANION_FILES:
        if (source / name).exists():
            shutil.copyfile(source / name, target / name)

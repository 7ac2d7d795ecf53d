"""Writes checkpoints in the format of OverFill's authors, from a decoder of ours."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


def write_two_stage(
    pair: Path,
    out: Path,
    *,
    sharded: bool = False,
    teacher: bool = False,
    kept: Sequence[int] | None = None,
    hidden_size: int | None = None,
) -> Path:
    """Writes the decoder of ``pair`` as ``student.…``, without any config, and returns ``out``. Leaves out a tied head.

    Args:
        sharded: True writes three files with an index.
        teacher: True adds the full model as ``teacher.…``.
        kept: Layers of the decoder to keep, which are numbered anew. None keeps all.
        hidden_size: Channels to keep. None keeps all.
    """
    out.mkdir(parents=True)
    tensors = {f"student.{name}": tensor for name, tensor in _decoder(pair / "decoder", kept).items()}
    if hidden_size is not None:
        tensors = {name: _narrow(name, tensor, hidden_size) for name, tensor in tensors.items()}
    if teacher:
        tensors |= {f"teacher.{name}": tensor for name, tensor in _load(pair / "full").items()}
    if not sharded:
        save_file(tensors, out / "model.safetensors")
        return out
    places = {name: f"model-0000{1 + (i % 3)}-of-00003.safetensors" for i, name in enumerate(sorted(tensors))}
    for file in set(places.values()):
        save_file({name: tensor for name, tensor in tensors.items() if places[name] == file}, out / file)
    (out / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return out


def _decoder(folder: Path, kept: Sequence[int] | None) -> dict[str, torch.Tensor]:
    tensors = _load(folder)
    if kept is None:
        return tensors
    numbers = {str(old): str(new) for new, old in enumerate(kept)}
    found = {}
    for name, tensor in tensors.items():
        parts = name.split(".")
        if parts[:2] == ["model", "layers"]:
            if parts[2] not in numbers:
                continue
            parts[2] = numbers[parts[2]]
        found[".".join(parts)] = tensor
    return found


def _narrow(name: str, tensor: torch.Tensor, hidden_size: int) -> torch.Tensor:
    """Keeps the first channels of the residual stream: rows of what writes to it, columns of what reads it."""
    if name.endswith(("o_proj.weight", "down_proj.weight", "layernorm.weight", "model.norm.weight")):
        return tensor[:hidden_size].contiguous()
    return tensor[:, :hidden_size].contiguous()


def _load(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}

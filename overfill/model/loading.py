"""Reads a model's weights from safetensors into the few fused matrices that the forward pass uses.

Every matrix is allocated once and filled tensor by tensor from the mapped file, so that no second copy of the
model exists. Knows Hugging Face's tensor names; knows nothing about how the weights are used.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from overfill.errors import InvalidPair, UnsupportedModel
from overfill.model.config import ModelConfig

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_HEAD = "lm_head.weight"
_EMBEDDING = "model.embed_tokens.weight"
_FLOATS = ("F32", "BF16", "F16")


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One decoder layer. Matrices are [out, in]; biases and qk norms are None where the model has none.

    Attributes:
        input_norm, post_norm: [hidden].
        qkv: [(num_heads + 2 * num_kv_heads) * head_dim, hidden], rows of q, then k, then v.
        qkv_bias: [(num_heads + 2 * num_kv_heads) * head_dim].
        q_norm, k_norm: [head_dim].
        o: [hidden, num_heads * head_dim]; o_bias: [hidden].
        gate_up: [2 * intermediate, hidden], rows of gate, then up; gate_up_bias: [2 * intermediate].
        down: [hidden, intermediate]; down_bias: [hidden].
    """

    input_norm: Tensor
    qkv: Tensor
    qkv_bias: Tensor | None
    q_norm: Tensor | None
    k_norm: Tensor | None
    o: Tensor
    o_bias: Tensor | None
    post_norm: Tensor
    gate_up: Tensor
    gate_up_bias: Tensor | None
    down: Tensor
    down_bias: Tensor | None


@dataclass(frozen=True, slots=True)
class Weights:
    """All weights of a model, of one dtype, on one device.

    Attributes:
        embedding: [vocab, hidden].
        norm: [hidden], before the head.
        head: [vocab, hidden]; the very tensor ``embedding`` when the two are tied.
    """

    embedding: Tensor
    layers: tuple[LayerWeights, ...]
    norm: Tensor
    head: Tensor


def load_weights(
    folder: Path,
    config: ModelConfig,
    dtype: torch.dtype,
    device: torch.device,
    progress: Callable[[int, int], None] | None = None,
) -> Weights:
    """Loads ``model.safetensors``, or the shards that ``model.safetensors.index.json`` lists.

    Args:
        dtype: of the result; the files may hold float32, bfloat16 or float16.
        progress: called with (bytes done, bytes in total), counted in ``dtype``, after every tensor.

    Raises:
        InvalidPair: a file or tensor is missing, damaged, not the model's, or has another shape; it is named.
        UnsupportedModel: a tensor is quantised or of another type that is not a float.
    """
    files = _tensor_files(folder)
    expected = _destinations(config, _allocate(config, dtype, torch.device("meta")))
    _check(folder, files, expected, config)
    weights = _allocate(config, dtype, device)
    destinations = _destinations(config, weights)
    total = sum(t.numel() for t in destinations.values()) * dtype.itemsize
    done = 0
    for path in files:
        with _open(path) as file:
            for name in file.keys():  # noqa: SIM118  (the handle is not a mapping)
                if name not in destinations:
                    continue
                destinations[name].copy_(file.get_tensor(name))
                done += destinations[name].numel() * dtype.itemsize
                if progress is not None:
                    progress(done, total)
    if config.tie_embeddings:
        _check_tied_head(files, weights)
    return weights


def _allocate(config: ModelConfig, dtype: torch.dtype, device: torch.device) -> Weights:
    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    def optional(present: bool, size: int) -> Tensor | None:
        return empty(size) if present else None

    hidden, intermediate = config.hidden_size, config.intermediate_size
    qkv_rows = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim

    def layer() -> LayerWeights:
        return LayerWeights(
            input_norm=empty(hidden),
            qkv=empty(qkv_rows, hidden),
            qkv_bias=optional(config.qkv_bias, qkv_rows),
            q_norm=optional(config.qk_norm, config.head_dim),
            k_norm=optional(config.qk_norm, config.head_dim),
            o=empty(hidden, config.num_heads * config.head_dim),
            o_bias=optional(config.o_bias, hidden),
            post_norm=empty(hidden),
            gate_up=empty(2 * intermediate, hidden),
            gate_up_bias=optional(config.mlp_bias, 2 * intermediate),
            down=empty(hidden, intermediate),
            down_bias=optional(config.mlp_bias, hidden),
        )

    embedding = empty(config.vocab_size, hidden)
    head = embedding if config.tie_embeddings else empty(config.vocab_size, hidden)
    return Weights(embedding, tuple(layer() for _ in range(config.num_layers)), empty(hidden), head)


def _destinations(config: ModelConfig, weights: Weights) -> dict[str, Tensor]:
    """Where each tensor of the checkpoint goes: Hugging Face name -> view into ``weights``."""
    qkv_rows = [config.num_heads * config.head_dim] + [config.num_kv_heads * config.head_dim] * 2
    found: dict[str, Tensor | None] = {_EMBEDDING: weights.embedding, "model.norm.weight": weights.norm}
    if not config.tie_embeddings:
        found[_HEAD] = weights.head
    for index, layer in enumerate(weights.layers):
        prefix = f"model.layers.{index}."
        found[prefix + "input_layernorm.weight"] = layer.input_norm
        found[prefix + "post_attention_layernorm.weight"] = layer.post_norm
        found[prefix + "self_attn.q_norm.weight"] = layer.q_norm
        found[prefix + "self_attn.k_norm.weight"] = layer.k_norm
        for kind, qkv, o, gate_up, down in (
            ("weight", layer.qkv, layer.o, layer.gate_up, layer.down),
            ("bias", layer.qkv_bias, layer.o_bias, layer.gate_up_bias, layer.down_bias),
        ):
            if qkv is not None:
                for name, part in zip("qkv", torch.split(qkv, qkv_rows), strict=True):
                    found[f"{prefix}self_attn.{name}_proj.{kind}"] = part
            if gate_up is not None:
                for name, part in zip(("gate", "up"), gate_up.chunk(2), strict=True):
                    found[f"{prefix}mlp.{name}_proj.{kind}"] = part
            found[f"{prefix}self_attn.o_proj.{kind}"] = o
            found[f"{prefix}mlp.down_proj.{kind}"] = down
    return {name: tensor for name, tensor in found.items() if tensor is not None}


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


def _check(folder: Path, files: list[Path], expected: dict[str, Tensor], config: ModelConfig) -> None:
    """Compares names, types and shapes of all tensors before any memory is spent on them."""
    seen: set[str] = set()
    for path in files:
        with _open(path) as file:
            for name in file.keys():  # noqa: SIM118
                if _is_buffer(name):
                    continue
                if name in seen:
                    raise InvalidPair(f"{folder}: tensor {name} is there twice")
                seen.add(name)
                tied_head = name == _HEAD and config.tie_embeddings
                target = expected.get(_EMBEDDING if tied_head else name)
                if target is None:
                    raise InvalidPair(f"{path}: tensor {name} is not part of a {config.model_type} with this config")
                header = file.get_slice(name)
                if header.get_dtype() not in _FLOATS:
                    raise UnsupportedModel(f"{path}: tensor {name} is {header.get_dtype()}; supported are {_FLOATS}")
                if tuple(header.get_shape()) != tuple(target.shape):
                    shapes = f"{tuple(header.get_shape())}; the config implies {tuple(target.shape)}"
                    raise InvalidPair(f"{path}: tensor {name} has shape {shapes}")
    missing = [name for name in expected if name not in seen]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise InvalidPair(f"{folder}: tensor {missing[0]}{more} is missing")


def _check_tied_head(files: list[Path], weights: Weights) -> None:
    """Some writers store a tied head as well; then it must be what the config says it is."""
    for path in files:
        with _open(path) as file:
            if _HEAD in file.keys():  # noqa: SIM118
                head = file.get_tensor(_HEAD).to(weights.embedding.device, weights.embedding.dtype)
                if not torch.equal(head, weights.embedding):
                    raise InvalidPair(f"{path}: the config ties the embeddings, but {_HEAD} differs from {_EMBEDDING}")


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise InvalidPair(f"{path} cannot be read: {error}") from None


def _is_buffer(name: str) -> bool:
    """Old checkpoints carry RoPE's frequencies, which follow from the config."""
    return name.endswith("rotary_emb.inv_freq")

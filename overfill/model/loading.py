"""Reads a model's weights from safetensors into the fused matrices that the forward pass uses.

Every matrix is allocated once and filled tensor by tensor from the mapped file, so that no second copy of the model
exists. Int8 matrices are quantised tensor by tensor. This module knows Hugging Face's tensor names, but not how the
weights are used.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Generic

import torch
from torch import Tensor
from typing_extensions import TypeVar

from overfill.model.config import ModelConfig
from overfill.model.files import EMBEDDING, HEAD, check_tied_head, checked_files, open_tensors
from overfill.model.head import LowRankRows, low_rank_factors, tokens_in_row_order
from overfill.model.quantize import Int8Matrix, Matrix

M_co = TypeVar("M_co", bound=Matrix, default=Tensor, covariant=True)
"""Type of the matrices: plain tensors by default."""

M = TypeVar("M", bound=Matrix)


@dataclass(frozen=True, slots=True)
class LayerWeights(Generic[M_co]):
    """Weights of one transformer layer. Matrices are [out, in]; a bias or norm is None if the model has none.

    Attributes:
        input_norm, post_norm: [hidden].
        qkv: [(num_heads + 2 * num_kv_heads) * head_dim, hidden], the rows of q, then k, then v.
        qkv_bias: [(num_heads + 2 * num_kv_heads) * head_dim].
        q_norm, k_norm: [head_dim].
        o: [hidden, num_heads * head_dim]; o_bias: [hidden].
        gate_up: [2 * intermediate, hidden], the rows of gate, then up; gate_up_bias: [2 * intermediate].
        down: [hidden, intermediate]; down_bias: [hidden].
    """

    input_norm: Tensor
    qkv: M_co
    qkv_bias: Tensor | None
    q_norm: Tensor | None
    k_norm: Tensor | None
    o: M_co
    o_bias: Tensor | None
    post_norm: Tensor
    gate_up: M_co
    gate_up_bias: Tensor | None
    down: M_co
    down_bias: Tensor | None


@dataclass(frozen=True, slots=True)
class Weights(Generic[M_co]):
    """All weights of a model, on one device and in one dtype; matrices may be quantised.

    Attributes:
        embedding: [vocab, hidden]; never quantised, because a step reads only single rows of it.
        norm: [hidden], the norm before the head.
        head: [vocab, hidden], or [head_tokens, hidden] with a ``tail``. It is the same object as ``embedding`` when
            the two are tied and nothing is quantised.
        tail: the head's rows of low rank. None means that all rows are full.
    """

    embedding: Tensor
    layers: tuple[LayerWeights[M_co], ...]
    norm: Tensor
    head: M_co
    tail: LowRankRows[M_co] | None = None

    @property
    def bytes_read(self) -> int:
        """Bytes of weights that a decode step reads: all but the embedding, of which it reads one row per token."""
        parts = [getattr(layer, field) for layer in self.layers for field in LayerWeights.__slots__]
        return sum(part.nbytes for part in (*parts, self.norm, self.head, self.tail) if part is not None)


def load_weights(
    folder: Path,
    config: ModelConfig,
    dtype: torch.dtype,
    device: torch.device,
) -> Weights:
    """Loads ``model.safetensors``, or the shards that ``model.safetensors.index.json`` lists.

    Args:
        dtype: dtype of the result; the files may hold float32, bfloat16 or float16.

    Raises:
        InvalidPair: a file or tensor is missing, damaged, surplus, or has another shape; the message names it.
        UnsupportedModel: a tensor's dtype is not a supported float.
    """
    files = checked_files(folder, config, expected_shapes(config))
    weights = _dense(config, dtype, device)
    _fill(weights, files, config)
    return _with_tail(weights, weights.head, config, lambda rows: rows.to(dtype))


def load_int8_weights(
    folder: Path,
    config: ModelConfig,
    dtype: torch.dtype,
    device: torch.device,
) -> Weights[Int8Matrix]:
    """Loads weights and quantises every matrix except the embedding, from the files' values.

    A tied head becomes a quantised copy; the embedding stays as it is. Arguments and errors are those of
    ``load_weights``.
    """
    files = checked_files(folder, config, expected_shapes(config))

    def matrix(rows: int, columns: int) -> Int8Matrix:
        return Int8Matrix.empty(rows, columns, device)

    shape = config.vocab_size, config.hidden_size
    embedding = torch.empty(shape, dtype=dtype, device=device)
    if not config.tail_rank:
        weights = _allocate(config, embedding, matrix(*shape), matrix)
        _fill(weights, files, config)
        return weights
    whole = torch.empty(shape, dtype=torch.float32, device=device)
    weights = _allocate(config, embedding, matrix(0, config.hidden_size), matrix)
    _fill(weights, files, config, head=whole)
    return _with_tail(weights, whole, config, Int8Matrix.of)


def state_dict(config: ModelConfig, weights: Weights) -> dict[str, Tensor]:
    """Maps Hugging Face tensor names to views of ``weights``; a tied head has no entry."""
    return {name: parts[0] for name, parts in _destinations(config, weights).items() if isinstance(parts[0], Tensor)}


def expected_shapes(config: ModelConfig) -> dict[str, torch.Size]:
    """Maps the Hugging Face names of a plain checkpoint's tensors to their shapes; a tied head has no entry."""
    outline = _destinations(config, _dense(config, torch.float32, torch.device("meta")))
    return {name: parts[0].shape for name, parts in outline.items()}


def count_parameters(config: ModelConfig) -> int:
    """Number of weights of a model, however they are stored. A tied head counts once."""
    return sum(shape.numel() for shape in expected_shapes(config).values())


def _dense(config: ModelConfig, dtype: torch.dtype, device: torch.device) -> Weights:
    def matrix(rows: int, columns: int) -> Tensor:
        return torch.empty(rows, columns, dtype=dtype, device=device)

    embedding = matrix(config.vocab_size, config.hidden_size)
    if config.tail_rank:  # all rows, in float32, until `_with_tail` factorises them
        head = torch.empty(config.vocab_size, config.hidden_size, dtype=torch.float32, device=device)
    else:
        head = embedding if config.tie_embeddings else matrix(config.vocab_size, config.hidden_size)
    return _allocate(config, embedding, head, matrix)


def _with_tail(weights: Weights[M], head: Tensor, config: ModelConfig, made: Callable[[Tensor], M]) -> Weights[M]:
    """Splits ``head`` into full rows and a tail, if the config says so.

    Args:
        head: [vocab, hidden] float32.
        made: makes a matrix of the result from float32 rows.
    """
    if not config.tail_rank:
        return weights
    order = tokens_in_row_order(config.vocab_size, config.head_mask).to(head.device)
    whole, rest = order.split([config.head_tokens, config.vocab_size - config.head_tokens])
    left, right = low_rank_factors(head[rest], config.tail_rank)
    return replace(weights, head=made(head[whole]), tail=LowRankRows(made(left), made(right), order.argsort()))


def _allocate(config: ModelConfig, embedding: Tensor, head: M, matrix: Callable[[int, int], M]) -> Weights[M]:
    """Allocates all layers; ``matrix`` makes the matrices, and vectors have ``embedding``'s dtype and device."""

    def empty(size: int) -> Tensor:
        return embedding.new_empty(size)

    def optional(present: bool, size: int) -> Tensor | None:
        return empty(size) if present else None

    hidden, intermediate = config.hidden_size, config.intermediate_size
    qkv_rows = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim

    def layer() -> LayerWeights[M]:
        return LayerWeights(
            input_norm=empty(hidden),
            qkv=matrix(qkv_rows, hidden),
            qkv_bias=optional(config.qkv_bias, qkv_rows),
            q_norm=optional(config.qk_norm, config.head_dim),
            k_norm=optional(config.qk_norm, config.head_dim),
            o=matrix(hidden, config.num_heads * config.head_dim),
            o_bias=optional(config.o_bias, hidden),
            post_norm=empty(hidden),
            gate_up=matrix(2 * intermediate, hidden),
            gate_up_bias=optional(config.mlp_bias, 2 * intermediate),
            down=matrix(hidden, intermediate),
            down_bias=optional(config.mlp_bias, hidden),
        )

    return Weights(embedding, tuple(layer() for _ in range(config.num_layers)), empty(hidden), head)


def _fill(
    weights: Weights[Matrix],
    files: list[Path],
    config: ModelConfig,
    head: Tensor | None = None,
) -> None:
    """Copies the files' tensors into ``weights``; ``head``, if given, receives the head's rows instead."""
    destinations = _destinations(config, weights)
    if head is not None:
        destinations[HEAD] = [head]
    for path in files:
        with open_tensors(path) as file:
            for name in file.keys():  # noqa: SIM118  (the handle is not a mapping)
                if name not in destinations:
                    continue
                tensor = file.get_tensor(name)
                for destination in destinations[name]:
                    destination.copy_(tensor)
    if config.tie_embeddings:
        check_tied_head(files, weights.embedding)


def _destinations(config: ModelConfig, weights: Weights[Matrix]) -> dict[str, list[Matrix]]:
    """Destinations of each tensor of the checkpoint: Hugging Face name -> views into ``weights``."""
    heads, kv_heads = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    found: dict[str, list[Matrix | None]] = {EMBEDDING: [weights.embedding], "model.norm.weight": [weights.norm]}
    if weights.head is not weights.embedding:
        found.setdefault(EMBEDDING if config.tie_embeddings else HEAD, []).append(weights.head)
    for index, layer in enumerate(weights.layers):
        prefix = f"model.layers.{index}."
        found[prefix + "input_layernorm.weight"] = [layer.input_norm]
        found[prefix + "post_attention_layernorm.weight"] = [layer.post_norm]
        found[prefix + "self_attn.q_norm.weight"] = [layer.q_norm]
        found[prefix + "self_attn.k_norm.weight"] = [layer.k_norm]
        for kind, qkv, o, gate_up, down in (
            ("weight", layer.qkv, layer.o, layer.gate_up, layer.down),
            ("bias", layer.qkv_bias, layer.o_bias, layer.gate_up_bias, layer.down_bias),
        ):
            if qkv is not None:
                for name, part in zip("qkv", _split(qkv, [heads, kv_heads, kv_heads]), strict=True):
                    found[f"{prefix}self_attn.{name}_proj.{kind}"] = [part]
            if gate_up is not None:
                for name, part in zip(("gate", "up"), _split(gate_up, [config.intermediate_size] * 2), strict=True):
                    found[f"{prefix}mlp.{name}_proj.{kind}"] = [part]
            found[f"{prefix}self_attn.o_proj.{kind}"] = [o]
            found[f"{prefix}mlp.down_proj.{kind}"] = [down]
    present = {name: [part for part in parts if part is not None] for name, parts in found.items()}
    return {name: parts for name, parts in present.items() if parts}


def _split(matrix: Matrix, rows: list[int]) -> Sequence[Matrix]:
    return torch.split(matrix, rows) if isinstance(matrix, Tensor) else matrix.split(rows)

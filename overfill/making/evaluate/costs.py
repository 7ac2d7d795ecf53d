"""Computes the cost of one decode step from a model's geometry: weights, bytes and operations per token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from overfill.kv.spec import DTYPE_BYTES, SCALE_BYTES, KvCacheDtype, Quantization
from overfill.model.config import ModelConfig

Rounding = Literal["bf16", "int8", "int4"]
Precision = Literal["bf16", "int8", "int4+int8 head", "int4"]
PRECISIONS: dict[Precision, tuple[Rounding, Rounding]] = {
    "bf16": ("bf16", "bf16"),
    "int8": ("int8", "int8"),
    "int4+int8 head": ("int4", "int8"),
    "int4": ("int4", "int4"),
}
"""Rounding of the layers' matrices and of the head. 4-bit formats usually keep the head at more bits."""

INT4_GROUP = 32
_INT4_GROUP_BYTES = INT4_GROUP // 2 + 4  # 32 numbers of 4 bits, a scale and an offset of 16 bits


@dataclass(frozen=True, slots=True)
class DecodeCost:
    """Weights read and operations computed for one token, without those of the KV cache.

    Attributes:
        weights: Number of elements of all matrices, head included. The one row read from the embedding is not counted.
        bytes: Size of these weights, with the scales of quantised ones.
        flops: One multiplication and one addition per weight.
    """

    weights: int
    bytes: int
    flops: int

    @classmethod
    def of(cls, config: ModelConfig, precision: Precision) -> DecodeCost:
        layers, head = PRECISIONS[precision]
        matrices = [(*shape, layers) for shape in _layer_matrices(config)] * config.num_layers
        matrices += [(rows, columns, head) for rows, columns in config.head_matrices]
        weights = sum(rows * columns for rows, columns, _ in matrices)
        size = sum(rows * _row_bytes(columns, rounding) for rows, columns, rounding in matrices)
        return cls(weights, size, 2 * weights)


def weight_bytes(config: ModelConfig, quantize: Quantization, dtype: str) -> int:
    """Bytes of weights that one decode step reads."""
    if quantize == "int8":
        return DecodeCost.of(config, "int8").bytes
    return DecodeCost.of(config, "bf16").weights * DTYPE_BYTES[dtype]


def kv_token_bytes(config: ModelConfig, dtype: str, cache: KvCacheDtype = "auto") -> int:
    """Bytes of KV that one decode step reads for each token before it."""
    vector = config.head_dim + SCALE_BYTES if cache == "int8" else config.head_dim * DTYPE_BYTES[dtype]
    return 2 * config.num_layers * config.num_kv_heads * vector


def _layer_matrices(config: ModelConfig) -> list[tuple[int, int]]:
    """Returns (rows, columns) of qkv, o, fused gate and up, and down."""
    attention = config.num_heads * config.head_dim
    return [
        (attention + 2 * config.num_kv_heads * config.head_dim, config.hidden_size),
        (config.hidden_size, attention),
        (2 * config.intermediate_size, config.hidden_size),
        (config.hidden_size, config.intermediate_size),
    ]


def _row_bytes(columns: int, rounding: Rounding) -> int:
    if rounding == "bf16":
        return 2 * columns
    if rounding == "int8":
        return columns + 4  # one float32 scale
    return -(-columns // INT4_GROUP) * _INT4_GROUP_BYTES

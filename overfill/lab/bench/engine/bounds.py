"""Computes lower bounds on the time of a decode step and of a prefill, from bytes and operations. Measures nothing.

A decode step reads every weight once, and the keys and values of every sequence once. A prefill is limited by matrix
products. The loaded model reports its weight bytes, so an int8 weight counts as one byte.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from overfill.lab.bench.engine.machine import Machine
from overfill.model.config import ModelConfig


@dataclass(frozen=True, slots=True)
class ModelCost:
    """Bytes that one model reads, and floating-point operations that it computes.

    Attributes:
        weight_bytes: Weight bytes read in a step, at any batch size.
        kv_token_bytes: Bytes of the keys and values of one token in all layers.
        layer_flops: Operations of the matrix products of one token in all layers.
        tail_flops: Part of ``layer_flops`` that follows the last layer's key and value projections.
        head_flops: Operations of the output head for one token.
        attention_flops: Operations of attention in all layers, per new token and token attended to.
        num_layers: Number of layers of the model.
    """

    weight_bytes: int
    kv_token_bytes: int
    layer_flops: int
    tail_flops: int
    head_flops: int
    attention_flops: int
    num_layers: int

    @classmethod
    def of(cls, config: ModelConfig, weight_bytes: int, kv_token_bytes: int) -> ModelCost:
        width = config.num_heads * config.head_dim
        qkv = width + 2 * config.num_kv_heads * config.head_dim
        tail = config.hidden_size * (width + 3 * config.intermediate_size)
        return cls(
            weight_bytes=weight_bytes,
            kv_token_bytes=kv_token_bytes,
            layer_flops=2 * (config.hidden_size * qkv + tail) * config.num_layers,
            tail_flops=2 * tail,
            head_flops=2 * sum(rows * columns for rows, columns in config.head_matrices),
            attention_flops=4 * width * config.num_layers,
            num_layers=config.num_layers,
        )


def decode_step_seconds(cost: ModelCost, machine: Machine, batch: int, context: float) -> float:
    """Minimum seconds of a decode step for ``batch`` sequences with a mean context of ``context`` tokens.

    The formula is max(weight bytes / bandwidth, flops / matrix rate) + KV bytes / bandwidth. Reading weights and
    multiplying with them can overlap; reading KV comes on top.
    """
    flops = batch * (cost.layer_flops + cost.head_flops)
    weights = max(cost.weight_bytes / machine.bandwidth, flops / machine.matrix_rate)
    return weights + batch * context * cost.kv_token_bytes / machine.bandwidth


def prefill_seconds(cost: ModelCost, machine: Machine, lengths: Sequence[int]) -> float:
    """Minimum seconds to prefill prompts of these lengths in one pass and compute the logits of each last token.

    Attention is causal: token i attends to i tokens. After the last layer's keys and values, only the last token of
    each prompt is computed.
    """
    body = sum(lengths) * (cost.layer_flops - cost.tail_flops)
    ends = len(lengths) * (cost.tail_flops + cost.head_flops)
    attended = sum(n * (n + 1) // 2 * (cost.num_layers - 1) + n for n in lengths)
    flops = body + ends + attended * cost.attention_flops // cost.num_layers
    return max(flops / machine.matrix_rate, cost.weight_bytes / machine.bandwidth)

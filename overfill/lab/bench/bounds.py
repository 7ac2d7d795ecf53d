"""The least time that a step can take on a machine: arithmetic on bytes and operations, no measurement.

A decode step reads every weight once and every sequence's keys and values once; a prefill computes. What a model's
weights weigh is asked of the loaded model, so int8 weights count as the bytes they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from overfill.lab.bench.machine import Machine
from overfill.model.config import ModelConfig


@dataclass(frozen=True, slots=True)
class ModelCost:
    """What one model reads and computes.

    Attributes:
        weight_bytes: read in a step, whatever the batch.
        kv_token_bytes: keys and values of one token in all layers.
        layer_flops: matrix products of one token through all layers.
        tail_flops: the part of ``layer_flops`` that lies behind the last layer's keys and values.
        head_flops: the output head for one token.
        attention_flops: scores and weighted values of one new token, per token attended to, in all layers.
        num_layers: of the model.
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
    """Least time of a step that computes one token for each of ``batch`` sequences of ``context`` tokens (a mean).

    max(weight bytes / bandwidth, flops / rate) + KV bytes / bandwidth: the weights' products can hide behind reading
    them or the other way round; attention reads its KV besides.
    """
    flops = batch * (cost.layer_flops + cost.head_flops)
    weights = max(cost.weight_bytes / machine.bandwidth, flops / machine.matrix_rate)
    return weights + batch * context * cost.kv_token_bytes / machine.bandwidth


def prefill_seconds(cost: ModelCost, machine: Machine, lengths: Sequence[int]) -> float:
    """Least time to compute prompts of these lengths in one pass, with the logits of each one's last token.

    Attention is causal: token i attends to i tokens. Behind the last layer's keys and values only last tokens count.
    """
    body = sum(lengths) * (cost.layer_flops - cost.tail_flops)
    ends = len(lengths) * (cost.tail_flops + cost.head_flops)
    attended = sum(n * (n + 1) // 2 * (cost.num_layers - 1) + n for n in lengths)
    flops = body + ends + attended * cost.attention_flops // cost.num_layers
    return max(flops / machine.matrix_rate, cost.weight_bytes / machine.bandwidth)

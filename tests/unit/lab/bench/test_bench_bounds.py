"""Tests the arithmetic of bounds."""

from __future__ import annotations

import pytest

from overfill.lab.bench.engine.bounds import ModelCost, decode_step_seconds, prefill_seconds
from overfill.lab.bench.engine.machine import Machine

COST = ModelCost(
    weight_bytes=1000,
    kv_token_bytes=10,
    layer_flops=600,
    tail_flops=250,
    head_flops=400,
    attention_flops=4,
    num_layers=2,
)


@pytest.mark.parametrize(
    ("batch", "weights"),
    [
        (1, 1000 / 100),  # memory-bound: reading the weights is slower than multiplying
        (40, 40 * 1000 / 2000),  # compute-bound: reading overlaps with multiplying
    ],
)
def test_a_decode_step_is_bound_by_weights_or_products_and_kv_besides(batch, weights):
    machine = Machine(bandwidth=100, matrix_rate=2000)
    assert decode_step_seconds(COST, machine, batch, context=50) == weights + batch * 50 * 10 / 100


def test_prefill_counts_causal_attention_and_what_lies_behind_the_last_kv_once_per_prompt():
    machine = Machine(bandwidth=1e9, matrix_rate=1)
    first_layer, last_layer = (6 + 3) * 2, (3 + 2) * 2
    assert prefill_seconds(COST, machine, [3, 2]) == 5 * 350 + 2 * (250 + 400) + first_layer + last_layer
    assert prefill_seconds(COST, Machine(bandwidth=1, matrix_rate=1e9), [3]) == 1000

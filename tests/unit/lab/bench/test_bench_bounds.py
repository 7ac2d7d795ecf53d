"""Tests the arithmetic of bounds and medians, and rows as JSON and as a table."""

from __future__ import annotations

import io
import json
from dataclasses import replace

import pytest
from rich.console import Console

from overfill.lab.bench.engine.bounds import ModelCost, decode_step_seconds, prefill_seconds
from overfill.lab.bench.engine.machine import Machine
from overfill.lab.bench.engine.rows import Row, rows_table

COST = ModelCost(
    weight_bytes=1000,
    kv_token_bytes=10,
    layer_flops=600,
    tail_flops=250,
    head_flops=400,
    attention_flops=4,
    num_layers=2,
)
ROW = Row(
    name="decode_full",
    batch=8,
    value=80.0,
    unit="tokens/s",
    bound=100.0,
    spread=0.1,
    pair="identity",
    context=512,
    dtype="bfloat16",
    weights="int8",
    kv_cache="int8",
    threads=2,
    device="cpu",
    bandwidth=25e9,
    matrix_rate=4e11,
    peer="vllm",
    peer_value=32.0,
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


def test_a_row_is_a_line_of_json_with_ratios_to_bound_and_peer():
    line = ROW.to_json()
    assert "\n" not in line
    found = json.loads(line)
    assert list(found)[:8] == ["name", "batch", "value", "unit", "bound", "ratio", "peer", "peer_value"]
    assert (found["ratio"], found["peer_ratio"]) == (0.8, 2.5)
    assert {"context", "dtype", "weights", "threads", "bandwidth", "matrix_rate", "spread"} <= found.keys()
    alone = json.loads(replace(ROW, peer=None, peer_value=None).to_json())
    assert (alone["peer_value"], alone["peer_ratio"]) == (None, None)


def test_the_table_has_a_line_per_figure_and_a_column_for_the_peer():
    rows = [ROW, replace(ROW, batch=1, peer=None, peer_value=None)]
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(rows_table(rows))
    lines = [line for line in console.export_text().splitlines() if "decode_full" in line]
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines]
    figure = ("512", "80.0", "5", "100", "0.80")
    assert cells == [
        ["decode_full, int8, int8 KV", "8", *figure, "32.0 (2.50×)"],
        ["decode_full, int8, int8 KV", "1", *figure, "–"],
    ]

"""Tests heads with rows of low rank: their factors are recovered exactly, and lowering the rank costs the least."""

from __future__ import annotations

from base64 import b64decode, b64encode
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

from overfill.errors import InvalidPair
from overfill.making.distill.model import PackedModel
from overfill.making.head_plan import head_mask_of, lower_rank
from overfill.making.prune import HeadPlan
from overfill.model.config import ModelConfig
from overfill.model.head import low_rank_factors, tokens_in_row_order
from overfill.model.loading import load_int8_weights
from overfill.pair.hf_model import load_hf_model, round_to_int8

CPU = torch.device("cpu")
CONFIG = LlamaConfig(
    vocab_size=90,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    overfill_head={"tokens": 30, "tail_rank": 6, "whole": b64encode(head_mask_of(torch.arange(0, 90, 3), 90)).decode()},
)


def test_factors_of_rows_of_low_rank_are_exact() -> None:
    rows = torch.randn(60, 6) @ torch.randn(6, 32)
    left, right = low_rank_factors(rows, 6)
    assert left.shape == (60, 6)
    assert right.shape == (6, 32)
    torch.testing.assert_close(left @ right, rows, atol=1e-5, rtol=0)


def test_rows_of_higher_rank_are_refused() -> None:
    with pytest.raises(InvalidPair, match="exceed rank 6"):
        low_rank_factors(torch.randn(60, 32), 6)


def test_lowering_the_rank_drops_what_inputs_use_least() -> None:
    rows = torch.randn(60, 32)
    inputs = torch.randn(500, 32) * torch.logspace(0, -2, 32)
    covariance = inputs.T @ inputs / len(inputs)

    weighed = lower_rank(rows, covariance, 8)
    plain = lower_rank(rows, torch.eye(32), 8)

    assert torch.linalg.matrix_rank(weighed, rtol=1e-5) == 8
    errors = [(inputs @ (rows - lowered).T).square().mean() for lowered in (weighed, plain)]
    assert errors[0] < 0.5 * errors[1]


def test_the_rows_of_frequent_tokens_stay() -> None:
    plan = HeadPlan(torch.tensor([0, 0.5, 0, 0.1, 0, 0.4, 0, 0]), 4, 2)
    assert tokens_in_row_order(8, b64decode(plan.as_config()["whole"]))[:4].tolist() == [0, 1, 3, 5]
    head = torch.randn(8, 6)
    lowered = plan.apply(head, torch.eye(6))
    assert torch.equal(lowered[[0, 1, 3, 5]], head[[0, 1, 3, 5]])
    assert torch.linalg.matrix_rank(lowered[[2, 4, 6, 7]], rtol=1e-5) == 2


def test_int8_rounds_the_factors_as_the_reference_does(save_model, tmp_path: Path) -> None:
    save_model(CONFIG)
    config = ModelConfig.load(tmp_path)
    weights = load_int8_weights(tmp_path, config, torch.float32, CPU)
    assert weights.tail is not None
    stored = torch.cat([weights.head.dequantised(), weights.tail.left.dequantised() @ weights.tail.right.dequantised()])
    ours = stored[weights.tail.row_index]
    reference = load_hf_model(tmp_path)
    round_to_int8(reference)
    torch.testing.assert_close(ours, reference.lm_head.weight.detach(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("rank", [None, 4])
def test_training_keeps_the_rank(rank: int | None, save_model, tmp_path: Path) -> None:
    plain = save_model(CONFIG)
    model = PackedModel.load(tmp_path, torch.float32, CPU)
    if rank is not None:
        model.train_low_rank(rank, seed=0)
    torch.testing.assert_close(model.head, plain.lm_head.weight, atol=1e-5, rtol=0)

    model.head.square().sum().backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= 0.05 * parameter.grad
    stored = model.checkpoint()

    assert set(stored) == {name for name, _ in plain.named_parameters()}
    assert not torch.allclose(stored["lm_head.weight"], plain.lm_head.weight)
    low_rank_factors(stored["lm_head.weight"][model.order[30:]], 6)

"""Tests that frequencies and rotations equal those of transformers."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from overfill.model.config import ModelConfig
from overfill.model.rope import apply_rope, inverse_frequencies, rope_tables

CPU = torch.device("cpu")
SCALINGS = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 256,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512},
    "yarn-untruncated": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 512,
        "truncate": False,
        "beta_fast": 20.0,
        "beta_slow": 2.0,
    },
    "yarn-mscale": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 512,
        "mscale": 0.7,
        "mscale_all_dim": 1.0,
    },
    "yarn-attention-factor": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 512,
        "attention_factor": 1.5,
    },
}


def configs(name: str, theta: float) -> tuple[LlamaConfig, ModelConfig]:
    hf = LlamaConfig(
        architectures=["LlamaForCausalLM"],
        head_dim=64,
        max_position_embeddings=2048,
        rope_parameters=SCALINGS[name] | {"rope_theta": theta},
    )
    return hf, ModelConfig.from_dict(hf.to_dict())


@pytest.mark.parametrize("theta", [10000.0, 500000.0])
@pytest.mark.parametrize("name", SCALINGS)
def test_frequencies_and_tables_are_those_of_transformers(name: str, theta: float) -> None:
    hf, ours = configs(name, theta)
    reference = LlamaRotaryEmbedding(hf)

    frequencies = inverse_frequencies(ours.rope, 64)
    assert frequencies.shape == (32,)
    assert frequencies.dtype == torch.float32
    torch.testing.assert_close(frequencies, reference.inv_freq, rtol=1e-6, atol=0)

    cos, sin = rope_tables(ours.rope, 64, 300, CPU)
    want_cos, want_sin = reference(torch.zeros(1), torch.arange(300)[None])
    torch.testing.assert_close(cos, want_cos[0, :, :32], rtol=0, atol=1e-4)
    torch.testing.assert_close(sin, want_sin[0, :, :32], rtol=0, atol=1e-4)


def test_low_precision_is_rotated_in_float32_and_keeps_its_dtype() -> None:
    _, ours = configs("default", 10000.0)
    cos, sin = rope_tables(ours.rope, 64, 40, CPU)
    x = torch.randn(40, 2, 64).bfloat16()
    got = apply_rope(x, cos, sin)
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, apply_rope(x.float(), cos, sin).bfloat16())

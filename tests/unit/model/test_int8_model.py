"""Tests that a model quantised on load computes what its rounded weights compute, and stores them as int8."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_models import CPU, PROMPT, SHAPE
from torch import Tensor
from transformers import LlamaConfig, PretrainedConfig, Qwen2Config, Qwen3Config

from overfill.errors import InvalidPair
from overfill.model.config import ModelConfig
from overfill.model.loading import load_int8_weights
from overfill.model.quantize import Int8Matrix
from overfill.model.transformer import Transformer

CONFIGS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**SHAPE),
    "llama-tied": LlamaConfig(**SHAPE, tie_word_embeddings=True),
    "llama-biases": LlamaConfig(**SHAPE, attention_bias=True, mlp_bias=True),
    "qwen2-tied-odd-hidden": Qwen2Config(**SHAPE | {"hidden_size": 51}, head_dim=8, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**SHAPE, head_dim=16),
}


def rounded(matrix: Tensor) -> Tensor:
    scale = matrix.abs().amax(1, keepdim=True) / 127
    return torch.round(matrix / scale) * scale


@torch.no_grad()
def round_model(model: torch.nn.Module) -> None:
    """Rounds the matrices that the engine quantises; a tied head gets its own weights."""
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.weight = torch.nn.Parameter(rounded(module.weight))


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_are_those_of_the_rounded_weights(name: str, save_model, runner, tmp_path: Path) -> None:
    reference = save_model(CONFIGS[name])
    with torch.inference_mode():
        unrounded = reference(torch.tensor([PROMPT])).logits[0]
        round_model(reference)
        want = reference(torch.tensor([PROMPT])).logits[0]

    run = runner(Transformer.load(tmp_path, torch.float32, CPU, quantize="int8"))
    got = torch.cat([run.step({"a": PROMPT[:30]}), *(run.step({"a": [token]}) for token in PROMPT[30:])])

    torch.testing.assert_close(got, want, atol=1e-5, rtol=0)
    assert (want - unrounded).abs().max() > 1e-3  # rounding changes the logits


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_matrices_are_held_as_int8_and_the_rest_in_the_dtype(
    dtype: torch.dtype, tied: bool, save_model, tmp_path: Path
) -> None:
    reference = save_model(LlamaConfig(**SHAPE, tie_word_embeddings=tied))
    weights = load_int8_weights(tmp_path, ModelConfig.load(tmp_path), dtype, CPU)

    matrices = [m for layer in weights.layers for m in (layer.qkv, layer.o, layer.gate_up, layer.down)]
    matrices.append(weights.head)
    assert all(isinstance(matrix, Int8Matrix) for matrix in matrices)
    torch.testing.assert_close(weights.head.dequantised(), rounded(reference.lm_head.weight.detach()))
    assert torch.equal(weights.embedding, reference.model.embed_tokens.weight.to(dtype))
    norms = (2 * 3 + 1) * 48
    rows = sum(matrix.shape[0] for matrix in matrices)
    elements = sum(matrix.shape.numel() for matrix in matrices)
    assert weights.bytes_read == elements + 4 * rows + norms * dtype.itemsize


def test_weights_are_quantised_from_the_values_in_the_files(save_model, tmp_path: Path) -> None:
    save_model(CONFIGS["llama"])
    config = ModelConfig.load(tmp_path)
    exact, half = (load_int8_weights(tmp_path, config, dtype, CPU) for dtype in (torch.float32, torch.bfloat16))
    assert torch.equal(exact.head.values, half.head.values)
    assert torch.equal(exact.head.scales, half.head.scales)


def test_a_stored_head_that_differs_from_its_embedding_is_refused(save_model, tmp_path: Path) -> None:
    save_model(CONFIGS["llama-tied"])
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(InvalidPair, match="ties the embeddings"):
        Transformer.load(tmp_path, torch.float32, CPU, quantize="int8")

"""Tests that a checkpoint is loaded completely, or refused with a message that names the fault."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig

from overfill.errors import InvalidPair, UnsupportedModel
from overfill.model.config import ModelConfig
from overfill.model.loading import Weights, load_weights

CPU = torch.device("cpu")
SHAPE = {
    "vocab_size": 32,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
Q, GATE, HEAD = (
    "model.layers.1.self_attn.q_proj.weight",
    "model.layers.0.mlp.gate_proj.weight",
    "lm_head.weight",
)


def load(folder: Path, dtype: torch.dtype = torch.float32) -> Weights:
    return load_weights(folder, ModelConfig.load(folder), dtype, CPU)


def rewrite(folder: Path, change) -> None:
    """Applies ``change`` to the tensors of the folder's only file."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def test_shards_load_as_one_file_does(save_model, tmp_path: Path) -> None:
    model = save_model(LlamaConfig(**SHAPE))
    whole = load(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    model.save_pretrained(tmp_path, max_shard_size="8KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2

    sharded = load(tmp_path)
    assert torch.equal(sharded.embedding, whole.embedding)
    assert torch.equal(sharded.head, whole.head)
    for ours, theirs in zip(sharded.layers, whole.layers, strict=True):
        assert torch.equal(ours.qkv, theirs.qkv)
        assert torch.equal(ours.gate_up, theirs.gate_up)


def test_a_tied_head_that_is_stored_as_well_must_agree(save_model, tmp_path: Path) -> None:
    save_model(LlamaConfig(**SHAPE, tie_word_embeddings=True))
    rewrite(tmp_path, lambda t: t.update({HEAD: t["model.embed_tokens.weight"].clone()}))
    load(tmp_path)
    rewrite(tmp_path, lambda t: t[HEAD].add_(1))
    with pytest.raises(InvalidPair, match=r"ties the embeddings, but lm_head\.weight differs"):
        load(tmp_path)


def test_weights_take_the_dtype_asked_for_and_are_a_copy(save_model, tmp_path: Path) -> None:
    reference = save_model(LlamaConfig(**SHAPE))
    weights = load(tmp_path, torch.bfloat16)
    assert torch.equal(weights.embedding, reference.model.embed_tokens.weight.bfloat16())
    exact = load(tmp_path)
    before = exact.norm.clone()
    rewrite(tmp_path, lambda t: t["model.norm.weight"].zero_())
    assert torch.equal(exact.norm, before)


def test_frequency_buffers_of_old_checkpoints_are_ignored(save_model, tmp_path: Path) -> None:
    save_model(LlamaConfig(**SHAPE))
    rewrite(tmp_path, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(3)}))
    load(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(Q), rf"tensor {re.escape(Q)} is missing"),
        (lambda t: (t.pop(Q), t.pop(GATE)), r"and 1 more are missing"),
        (lambda t: t.update(surplus=torch.ones(2)), r"tensor surplus is not part of a llama"),
        (lambda t: t.update({Q: t[Q][:-1].clone()}), rf"{re.escape(Q)} has shape \(23, 24\); .* \(24, 24\)"),
        (lambda t: t.pop(HEAD), r"tensor lm_head\.weight is missing"),
        (lambda t: t.update({"lm_head.bias": torch.ones(32)}), r"tensor lm_head\.bias is not part"),
    ],
)  # fmt: skip
def test_missing_surplus_and_misshapen_tensors_are_named(change, message: str, save_model, tmp_path: Path) -> None:
    save_model(LlamaConfig(**SHAPE))
    rewrite(tmp_path, change)
    with pytest.raises(InvalidPair, match=message):
        load(tmp_path)


def test_quantised_tensors_are_refused(save_model, tmp_path: Path) -> None:
    save_model(LlamaConfig(**SHAPE))
    rewrite(tmp_path, lambda t: t.update({Q: t[Q].to(torch.int8)}))
    with pytest.raises(UnsupportedModel, match=rf"{re.escape(Q)} is I8"):
        load(tmp_path)


def test_missing_and_damaged_files_are_named(save_model, tmp_path: Path) -> None:
    save_model(LlamaConfig(**SHAPE))
    file, index = tmp_path / "model.safetensors", tmp_path / "model.safetensors.index.json"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(InvalidPair, match=r"model\.safetensors: truncated"):
        load(tmp_path)
    file.unlink()
    with pytest.raises(InvalidPair, match=r"neither model\.safetensors nor model\.safetensors\.index\.json"):
        load(tmp_path)
    index.write_text("{}")
    with pytest.raises(InvalidPair, match=r"index\.json: malformed"):
        load(tmp_path)
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "other.safetensors").touch()
    for name, message in (
        ("model-00001-of-00002.safetensors", "not in the folder: model-00001-of-00002"),
        ("inner/other.safetensors", "'inner/other.safetensors' is not a file name"),
    ):
        index.write_text(json.dumps({"weight_map": {Q: name}}))
        with pytest.raises(InvalidPair, match=message):
            load(tmp_path)

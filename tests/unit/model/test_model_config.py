"""Tests which checkpoints the engine accepts, what it reads from their config, and how it refuses others."""

from __future__ import annotations

import json
from base64 import b64encode
from pathlib import Path

import pytest
import torch
from published_configs import LLAMA_31_8B
from transformers import LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from overfill.errors import InvalidPair, UnsupportedModel
from overfill.kv.spec import KvSpec, RopeSpec
from overfill.making.head_plan import head_mask_of
from overfill.model.config import ModelConfig
from overfill.model.head import tokens_in_row_order

LLAMA3_ROPE = RopeSpec("llama3", 500000.0, 8.0, 1.0, 4.0, original_max_positions=8192)
MISTRAL = LLAMA_31_8B | {"architectures": ["MistralForCausalLM"], "rope_scaling": None, "sliding_window": None}
QWEN2 = LLAMA_31_8B | {"architectures": ["Qwen2ForCausalLM"], "rope_scaling": None, "use_sliding_window": False}
QWEN3 = QWEN2 | {"architectures": ["Qwen3ForCausalLM"], "head_dim": 128}


def without(config: dict, *names: str) -> dict:
    return {name: value for name, value in config.items() if name not in names}


def test_a_head_in_two_parts_is_read() -> None:
    parts = {"overfill_head": {"tokens": 40000, "tail_rank": 96}}
    config = ModelConfig.from_dict(LLAMA_31_8B | parts)
    assert (config.head_tokens, config.tail_rank) == (40000, 96)
    assert config.head_matrices == [(40000, 4096), (96, 4096), (88256, 96)]
    assert config.head_mask == b""


def test_the_whole_rows_may_be_of_any_tokens() -> None:
    tokens = torch.tensor([128255, 7, 64])
    parts = {"tokens": 3, "tail_rank": 2, "whole": b64encode(head_mask_of(tokens, 128256)).decode()}
    order = tokens_in_row_order(128256, ModelConfig.from_dict(LLAMA_31_8B | {"overfill_head": parts}).head_mask)
    assert order[:5].tolist() == [7, 64, 128255, 0, 1]
    assert sorted(order.tolist()) == list(range(128256))


@pytest.mark.parametrize("whole", [b64encode(head_mask_of(torch.arange(4), 128256)).decode(), "AQ==", "?", 7])
def test_tokens_that_are_not_those_counted_are_refused(whole: object) -> None:
    with pytest.raises(InvalidPair, match="whole"):
        ModelConfig.from_dict(LLAMA_31_8B | {"overfill_head": {"tokens": 3, "tail_rank": 2, "whole": whole}})


@pytest.mark.parametrize(
    "parts", [{"tokens": 128256, "tail_rank": 96}, {"tokens": 10, "tail_rank": 4096}, {"tokens": 0}, [1]]
)
def test_parts_that_do_not_fit_the_sizes_are_refused(parts: object) -> None:
    with pytest.raises(InvalidPair, match=r"overfill_head|tail_rank|tokens"):
        ModelConfig.from_dict(LLAMA_31_8B | {"overfill_head": parts})


@pytest.mark.parametrize("cls", [LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config])
def test_what_transformers_writes_is_read(cls, tmp_path: Path) -> None:
    name = cls.__name__.replace("Config", "ForCausalLM")
    options = {"sliding_window": None} if cls is MistralConfig else {}
    cls(architectures=[name], num_key_value_heads=8, **options).save_pretrained(tmp_path)
    config = ModelConfig.load(tmp_path)
    assert (config.num_heads, config.num_kv_heads, config.head_dim) == (32, 8, 128)


@pytest.mark.parametrize(
    ("hf_config", "flags"),
    [
        (LLAMA_31_8B, (False, False, False, False)),
        (LLAMA_31_8B | {"attention_bias": True}, (True, True, False, False)),
        (LLAMA_31_8B | {"mlp_bias": True}, (False, False, True, False)),
        (MISTRAL, (False, False, False, False)),
        (QWEN2, (True, False, False, False)),
        (QWEN3, (False, False, False, True)),
        (QWEN3 | {"attention_bias": True}, (True, True, False, True)),
    ],
)
def test_biases_and_qk_norm_follow_the_architecture(hf_config: dict, flags: tuple[bool, ...]) -> None:
    config = ModelConfig.from_dict(hf_config)
    assert (config.qkv_bias, config.o_bias, config.mlp_bias, config.qk_norm) == flags


def test_head_dim_may_differ_from_hidden_size_over_heads() -> None:
    assert ModelConfig.from_dict(LLAMA_31_8B | {"head_dim": 64}).head_dim == 64
    odd = ModelConfig.from_dict(MISTRAL | {"hidden_size": 4097, "head_dim": 128})
    assert (odd.hidden_size, odd.head_dim) == (4097, 128)


def test_a_llama_from_before_grouped_query_attention() -> None:
    old = without(LLAMA_31_8B, "num_key_value_heads", "rope_theta", "rope_scaling", "attention_bias", "mlp_bias")
    config = ModelConfig.from_dict(old)
    assert config.num_kv_heads == 32
    assert config.rope == RopeSpec(theta=10000.0)


def test_a_window_as_long_as_the_context_is_no_window() -> None:
    assert ModelConfig.from_dict(MISTRAL | {"sliding_window": 131072}).max_positions == 131072
    assert ModelConfig.from_dict(QWEN2 | {"sliding_window": 4096}).model_type == "qwen2"


@pytest.mark.parametrize(
    ("hf_config", "words"),
    [
        (LLAMA_31_8B | {"architectures": ["GemmaForCausalLM"]}, ["GemmaFor", "LlamaFor", "Qwen3For"]),
        (MISTRAL | {"sliding_window": 4096}, ["sliding_window=4096", "131072"]),
        (without(MISTRAL, "sliding_window"), ["sliding_window=4096"]),
        (QWEN2 | {"use_sliding_window": True}, ["use_sliding_window=True"]),
        (QWEN3 | {"layer_types": ["sliding_attention"]}, ["layer_types", "sliding_attention"]),
        (LLAMA_31_8B | {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, ["rope_type='dynamic'", "yarn"]),
        (LLAMA_31_8B | {"rope_scaling": {"rope_type": "longrope"}}, ["rope_type='longrope'"]),
        (LLAMA_31_8B | {"partial_rotary_factor": 0.5}, ["partial_rotary_factor=0.5"]),
        (QWEN3 | {"rope_parameters": {"partial_rotary_factor": 0.25}}, ["partial_rotary_factor=0.25"]),
        (QWEN3 | {"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, ["rope_parameters"]),
        (LLAMA_31_8B | {"hidden_act": "gelu"}, ["hidden_act='gelu'"]),
        (LLAMA_31_8B | {"quantization_config": {"quant_method": "hqq"}}, ["quant_method='hqq'", "awq"]),
        (QWEN3 | {"num_experts": 128}, ["num_experts=128"]),
        (LLAMA_31_8B | {"num_key_value_heads": 5}, ["num_key_value_heads=5", "32"]),
        (LLAMA_31_8B | {"head_dim": 127}, ["head_dim=127"]),
    ],
)  # fmt: skip
def test_unsupported_options_are_refused_by_name(hf_config: dict, words: list[str]) -> None:
    with pytest.raises(UnsupportedModel) as refused:
        ModelConfig.from_dict(hf_config)
    for word in words:
        assert word in str(refused.value)


@pytest.mark.parametrize(
    "name",
    [
        "architectures",
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "rms_norm_eps",
        "max_position_embeddings",
    ],
)
def test_missing_fields_are_named(name: str) -> None:
    with pytest.raises(InvalidPair, match=name):
        ModelConfig.from_dict(without(LLAMA_31_8B, name))


@pytest.mark.parametrize("model", [MISTRAL, QWEN2])
def test_kv_heads_are_not_guessed(model: dict) -> None:
    with pytest.raises(InvalidPair, match="num_key_value_heads"):
        ModelConfig.from_dict(without(model, "num_key_value_heads"))


@pytest.mark.parametrize(
    "change", [{"hidden_size": 0}, {"vocab_size": "many"}, {"rms_norm_eps": -1}, {"num_hidden_layers": 1.5}]
)
def test_values_out_of_range_are_named(change: dict) -> None:
    (name,) = change
    with pytest.raises(InvalidPair, match=name):
        ModelConfig.from_dict(LLAMA_31_8B | change)


def test_generation_config_decides_what_ends_an_answer(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_31_8B | {"eos_token_id": 2}))
    assert ModelConfig.load(tmp_path).eos_token_ids == (2,)
    (tmp_path / "generation_config.json").write_text('{"temperature": 0.6}')
    assert ModelConfig.load(tmp_path).eos_token_ids == (2,)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 8]}')
    assert ModelConfig.load(tmp_path).eos_token_ids == (7, 8)
    assert ModelConfig.from_dict(LLAMA_31_8B | {"eos_token_id": None}).eos_token_ids == ()


@pytest.mark.parametrize(("content", "message"), [(None, "missing"), ("{", "not JSON"), ("[]", "not a JSON object")])
def test_a_config_that_cannot_be_read_is_named(content: str | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(InvalidPair, match=rf"config\.json .*{message}"):
        ModelConfig.load(tmp_path)


def test_kv_spec_is_what_the_cache_needs() -> None:
    assert ModelConfig.from_dict(LLAMA_31_8B).kv_spec("bfloat16") == KvSpec(32, 8, 128, "bfloat16", LLAMA3_ROPE)

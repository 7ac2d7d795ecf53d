"""Decoders of any hidden size load in plain transformers, which computes what the engine does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from published_configs import LLAMA_32_3B
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from overfill.engine.runner import ModelRunner
from overfill.engine.work import Work
from overfill.errors import InvalidPair, UnsupportedModel
from overfill.kv.cache import KvCache
from overfill.making.checkpoint import copy_companions, write_json, write_weights
from overfill.making.tiny import make_tiny_pair
from overfill.model.config import ModelConfig
from overfill.model.transformer import Transformer
from overfill.pair.hf_config import decoder_config, loadable_config
from overfill.pair.hf_model import load_hf_model, load_tokenizer

CPU = torch.device("cpu")
PROMPT = torch.randint(2, 512, (30,), generator=torch.Generator().manual_seed(5)).tolist()
SIZES: dict[str, Any] = {"hidden_size": 65, "intermediate_size": 50, "num_layers": 3}
ARCHITECTURES = ["llama", "mistral", "qwen2", "qwen3"]

# The 1B decoder that the paper's authors pruned from Llama 3.2 3B.
AUTHORS_1B = LLAMA_32_3B | {"hidden_size": 1689, "intermediate_size": 4505}


def read_config(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return config


@torch.no_grad()
def write_checkpoint(out: Path, config: dict[str, Any], companions: Path) -> Path:
    """Random weights for ``config``, and the tokenizer of ``companions``."""
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**loadable_config(config)), dtype=torch.float32)
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        parameter.normal_(1.0 if "norm" in name else 0.0, 0.15, generator=generator)
    tensors = model.state_dict()
    if config["tie_word_embeddings"]:
        del tensors["lm_head.weight"]
    out.mkdir()
    write_weights(out, tensors)
    write_json(out / "config.json", config)
    copy_companions(companions, out)
    return out


def engine_logits(folder: Path) -> torch.Tensor:
    """[len(PROMPT), vocab], token by token."""
    model = Transformer.load(folder, torch.float32, CPU)
    runner = ModelRunner(model, KvCache(model.config.kv_spec("float32"), 4, 16, CPU))
    steps = [runner.run([Work([token], i, [0, 1, 2, 3], wants_logits=True)]) for i, token in enumerate(PROMPT)]
    return torch.cat(steps)


@torch.inference_mode()
def plain_logits(model: Any) -> torch.Tensor:
    logits: torch.Tensor = model(torch.tensor([PROMPT])).logits[0]
    return logits


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_plain_transformers_loads_a_decoder_of_an_odd_size(architecture: str, tied: bool, tmp_path: Path) -> None:
    full = make_tiny_pair(tmp_path / "pair", architecture=architecture, identity=True) / "full"  # type: ignore[arg-type]
    config = decoder_config(read_config(full), **SIZES, tie_word_embeddings=tied)
    decoder = write_checkpoint(tmp_path / "decoder", config, full)

    model = AutoModelForCausalLM.from_pretrained(decoder, dtype=torch.float32).eval()

    want = plain_logits(model)
    assert want.std() > 0.3
    torch.testing.assert_close(engine_logits(decoder), want, atol=1e-4, rtol=0)
    parsed = ModelConfig.load(decoder)
    assert (parsed.hidden_size, parsed.intermediate_size, parsed.num_layers) == (65, 50, 3)
    assert (parsed.head_dim, parsed.num_heads, parsed.num_kv_heads, parsed.tie_embeddings) == (16, 4, 2, tied)


def test_a_llama_of_any_hidden_size_is_loaded_as_it_was_published(tmp_path: Path) -> None:
    full = make_tiny_pair(tmp_path / "pair", identity=True) / "full"
    config = read_config(full) | {"hidden_size": 65, "intermediate_size": 50, "num_hidden_layers": 3}
    config["rope_parameters"] = LLAMA_32_3B["rope_scaling"] | {
        "rope_theta": 500.0,
        "original_max_position_embeddings": 64,
    }
    decoder = write_checkpoint(tmp_path / "decoder", config, full)
    with pytest.raises(
        Exception, match="not a multiple"
    ):  # when transformers accepts it, the conversion to Mistral can be removed
        AutoModelForCausalLM.from_pretrained(decoder)

    model = load_hf_model(decoder)

    assert model.generation_config.eos_token_id == 1
    torch.testing.assert_close(engine_logits(decoder), plain_logits(model), atol=1e-4, rtol=0)
    assert load_tokenizer(decoder).chat_template


def test_the_authors_decoders_are_understood() -> None:
    parsed, full = ModelConfig.from_dict(AUTHORS_1B), ModelConfig.from_dict(LLAMA_32_3B)
    assert (parsed.hidden_size, parsed.num_heads, parsed.head_dim) == (1689, 24, 128)
    assert parsed.kv_spec("bfloat16") == full.kv_spec("bfloat16")
    as_mistral = ModelConfig.from_dict(loadable_config(AUTHORS_1B))
    assert as_mistral.model_type == "mistral"
    assert as_mistral.kv_spec("bfloat16") == full.kv_spec("bfloat16")


def test_a_decoder_stays_a_llama_where_it_can() -> None:
    config = decoder_config(
        LLAMA_32_3B, hidden_size=1680, intermediate_size=4505, num_layers=28, tie_word_embeddings=False
    )
    changed = {"hidden_size": 1680, "intermediate_size": 4505, "tie_word_embeddings": False}
    assert config == LLAMA_32_3B | changed
    assert loadable_config(LLAMA_32_3B) == LLAMA_32_3B


def test_what_the_full_model_leaves_to_defaults_is_stated() -> None:
    bare = {k: v for k, v in LLAMA_32_3B.items() if k not in ("head_dim", "num_key_value_heads", "rope_scaling")}
    config = decoder_config(bare, hidden_size=1689, intermediate_size=64, num_layers=2, tie_word_embeddings=False)
    assert (config["head_dim"], config["num_key_value_heads"], config["sliding_window"]) == (128, 24, None)
    assert ModelConfig.from_dict(config).rope == ModelConfig.from_dict(bare).rope


def test_a_llama_written_as_a_mistral_keeps_its_tokenizer(tmp_path: Path) -> None:
    full = make_tiny_pair(tmp_path / "pair", identity=True) / "full"
    old = read_config(full) | {"transformers_version": "4.45.0"}
    write_json(full / "config.json", old)
    config = decoder_config(old, **SIZES, tie_word_embeddings=False)
    decoder = write_checkpoint(tmp_path / "decoder", config, full)

    assert config["model_type"] == "mistral"
    assert not config["transformers_version"].startswith(
        "4."
    )  # otherwise transformers takes large tokenizers for damaged
    text = "What's 2024 + 17, naïve reader?\n\nIt isn't 2041 …"
    ours, theirs = AutoTokenizer.from_pretrained(decoder), AutoTokenizer.from_pretrained(full)
    assert ours(text)["input_ids"] == theirs(text)["input_ids"]
    assert ours.chat_template == theirs.chat_template


def test_layer_types_are_those_of_the_kept_layers(tmp_path: Path) -> None:
    full = read_config(make_tiny_pair(tmp_path / "pair", architecture="qwen2", identity=True) / "full")
    assert len(full["layer_types"]) == 4
    config = decoder_config(full, **SIZES, tie_word_embeddings=False)
    assert config["layer_types"] == ["full_attention"] * 3


@pytest.mark.parametrize("bias", ["attention_bias", "mlp_bias"])
def test_a_llama_with_biases_has_no_equal(bias: str) -> None:
    biased = LLAMA_32_3B | {bias: True}
    sizes = {"intermediate_size": 64, "num_layers": 2, "tie_word_embeddings": False}
    assert decoder_config(biased, hidden_size=48, **sizes)[bias]
    with pytest.raises(UnsupportedModel, match=r"hidden_size=50 .* a multiple of its 24 attention heads"):
        decoder_config(biased, hidden_size=50, **sizes)


def test_sizes_must_be_positive() -> None:
    with pytest.raises(InvalidPair, match="intermediate_size=0"):
        decoder_config(LLAMA_32_3B, hidden_size=48, intermediate_size=0, num_layers=2, tie_word_embeddings=False)

"""Writes configs that plain transformers loads, for decoders of any hidden size.

transformers refuses a Llama whose hidden size is not a multiple of its number of heads. The forward pass does not need
that, because head_dim is a separate field. The Mistral class accepts any hidden size, as Qwen2 and Qwen3 do. Without a
sliding window, it has the same tensors and the same forward pass as Llama.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import metadata
from typing import Any

from overfill.errors import UnsupportedModel
from overfill.model.config import HEAD_KEY, ModelConfig

_LLAMA_ONLY = ("attention_bias", "mlp_bias", "pretraining_tp", "layer_types")


def decoder_config(
    full_config: Mapping[str, Any],
    *,
    hidden_size: int,
    intermediate_size: int,
    num_layers: int,
    tie_word_embeddings: bool,
    head: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Returns a decoder's ``config.json``: the full model's, with other sizes and the same attention heads.

    Args:
        full_config: The full model's ``config.json``.
        head: Value for ``HEAD_KEY`` when the head has two parts (``HeadPlan.as_config``).

    Raises:
        InvalidPair: a size is not positive, or ``full_config`` is damaged.
        UnsupportedModel: no transformers class runs a decoder of this hidden size.
    """
    full = ModelConfig.from_dict(full_config)
    config = dict(full_config) | {
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "num_hidden_layers": num_layers,
        "tie_word_embeddings": tie_word_embeddings,
        "head_dim": full.head_dim,  # by default transformers derives it from the hidden size
    }
    if config.get("layer_types"):
        config["layer_types"] = ["full_attention"] * num_layers  # the only kind that the engine supports
    if head is not None:
        config[HEAD_KEY] = dict(head)
    config = loadable_config(config)
    ModelConfig.from_dict(config)
    return config


def loadable_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns ``config``; a Llama whose hidden size transformers refuses becomes a Mistral that computes the same.

    Raises:
        InvalidPair: ``config`` is damaged.
        UnsupportedModel: there is no equal Mistral, or the engine does not run ``config``.
    """
    parsed = ModelConfig.from_dict(config)
    if parsed.model_type != "llama" or parsed.hidden_size % parsed.num_heads == 0:
        return dict(config)
    if parsed.qkv_bias or parsed.mlp_bias:
        raise UnsupportedModel(
            f"hidden_size={parsed.hidden_size} is not supported: a Llama with biases needs a multiple of its "
            f"{parsed.num_heads} attention heads in transformers"
        )
    return {key: value for key, value in config.items() if key not in _LLAMA_ONLY} | {
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "sliding_window": None,
        # Stated, because the defaults of the two classes differ.
        "head_dim": parsed.head_dim,
        "num_key_value_heads": parsed.num_kv_heads,
        # transformers takes the tokenizer of a Mistral for damaged when a release before 5 wrote the config.
        "transformers_version": metadata.version("transformers"),
    }

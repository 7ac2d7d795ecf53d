"""Parses a checkpoint's config.json into the options that the engine runs. No tensors.

Reads both spellings of Hugging Face configs: ``rope_theta`` with ``rope_scaling``, and transformers 5's
``rope_parameters``. An option that the engine would compute differently is refused by name, never dropped silently.
"""

from __future__ import annotations

import json
import math
import os
from base64 import b64decode
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, cast, get_args

from overfill.errors import InvalidPair, InvalidRequest, UnsupportedModel
from overfill.kv.spec import DTypeName, KvSpec, RopeSpec

ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}
HEAD_KEY = "overfill_head"
"""Key of config.json for a head of which some rows are of low rank; see ``model.head``. Its value is an object:

- ``tokens``: number of rows of full rank
- ``tail_rank``: rank of the other rows
- ``whole``: ``ModelConfig.head_mask`` in base64; without it, the full rows are those of the lowest token ids
"""

WeightFormat = Literal["plain", "fp8", "awq", "gptq", "compressed-tensors"]
"""Format of a checkpoint's matrices in its files. ``plain`` is float32, bfloat16 or float16; the other names are those
of ``quant_method`` in ``quantization_config`` of config.json."""

_ROPE_TYPES = ("default", "linear", "llama3", "yarn")
_EXPERT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts")


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Shape and options of one Llama-family model.

    Attributes:
        head_dim: elements per head; ``num_heads * head_dim`` need not equal ``hidden_size``.
        max_positions: maximum context, in tokens.
        tie_embeddings: True if the output head is the embedding matrix.
        qkv_bias, o_bias, mlp_bias: True for projections that add a bias.
        qk_norm: True if queries and keys pass an RMSNorm per head before RoPE (Qwen3).
        head_tokens: number of the head's rows of full rank (``model.head``); ``vocab_size`` if all are.
        tail_rank: rank of the head's other rows; 0 if there are none.
        head_mask: tokens of the full rows: bit t % 8 of byte t // 8 is set for token t. Empty means the lowest ids.
        eos_token_ids: tokens that end an answer; empty when the checkpoint names none.
        weight_format: format of the matrices in the files.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope: RopeSpec
    max_positions: int
    tie_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    head_tokens: int
    tail_rank: int
    head_mask: bytes = field(repr=False)
    eos_token_ids: tuple[int, ...]
    weight_format: WeightFormat = "plain"

    @property
    def head_matrices(self) -> list[tuple[int, int]]:
        """(rows, columns) of each matrix that the head reads."""
        tail = [(self.tail_rank, self.hidden_size), (self.vocab_size - self.head_tokens, self.tail_rank)]
        return [(self.head_tokens, self.hidden_size), *(tail if self.tail_rank else [])]

    @classmethod
    def load(cls, folder: Path) -> ModelConfig:
        """Reads ``config.json``, and the end-of-sequence ids of ``generation_config.json`` if that file exists.

        Raises:
            InvalidPair: a file is missing or not JSON, or a field is missing or out of range.
            UnsupportedModel: the engine does not run this architecture or option.
        """
        config = cls.from_dict(read_json(folder / "config.json"))
        if (folder / "generation_config.json").exists():
            ids = eos_ids(read_json(folder / "generation_config.json"))
            config = replace(config, eos_token_ids=ids or config.eos_token_ids)
        return config

    @classmethod
    def from_dict(cls, hf_config: Mapping[str, Any]) -> ModelConfig:
        """Parses a Hugging Face ``config.json``; raises the errors of :meth:`load`."""
        model_type = _model_type(hf_config)
        num_heads = _count(hf_config, "num_attention_heads")
        hidden_size = _count(hf_config, "hidden_size")
        num_layers = _count(hf_config, "num_hidden_layers")
        max_positions = _count(hf_config, "max_position_embeddings")
        _refuse_unsupported(hf_config, model_type, max_positions)
        attention_bias = bool(hf_config.get("attention_bias", False)) and model_type in ("llama", "qwen3")
        vocab_size = _count(hf_config, "vocab_size")
        head_tokens, tail_rank, head_mask = _head(hf_config, vocab_size, hidden_size)
        config = cls(
            model_type=model_type,
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            intermediate_size=_count(hf_config, "intermediate_size"),
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=_num_kv_heads(hf_config, model_type, num_heads),
            head_dim=_head_dim(hf_config, model_type, hidden_size, num_heads),
            rms_norm_eps=_number(hf_config, "rms_norm_eps"),
            rope=_rope(hf_config, max_positions),
            max_positions=max_positions,
            tie_embeddings=bool(hf_config.get("tie_word_embeddings", False)),
            qkv_bias=attention_bias or model_type == "qwen2",
            o_bias=attention_bias,
            mlp_bias=bool(hf_config.get("mlp_bias", False)) and model_type == "llama",
            qk_norm=model_type == "qwen3",
            head_tokens=head_tokens,
            tail_rank=tail_rank,
            head_mask=head_mask,
            eos_token_ids=eos_ids(hf_config),
            weight_format=_weight_format(hf_config),
        )
        if config.num_heads % config.num_kv_heads:
            raise _unsupported(
                "num_key_value_heads", config.num_kv_heads, f"must divide num_attention_heads={num_heads}"
            )
        if config.head_dim % 2:
            raise _unsupported("head_dim", config.head_dim, "RoPE needs an even number")
        return config

    def check_plain(self, folder: Path) -> None:
        """Raises UnsupportedModel if the weights in ``folder`` are quantised in the files."""
        if self.weight_format != "plain":
            raise UnsupportedModel(
                f"{folder}: the weights are stored in {self.weight_format} (quantization_config in config.json); "
                "only float32, bfloat16 and float16 can be read here"
            )

    @property
    def attention_tokens(self) -> float:
        """Context length at which attention takes as many operations per token as a layer's matrices."""
        attended = self.num_heads * self.head_dim
        projections = self.hidden_size * (2 * attended + 2 * self.num_kv_heads * self.head_dim)
        return (projections + 3 * self.hidden_size * self.intermediate_size) / (2 * attended)

    def kv_spec(self, dtype: DTypeName) -> KvSpec:
        """Geometry of this model's KV cache with elements of ``dtype``."""
        return KvSpec(self.num_layers, self.num_kv_heads, self.head_dim, dtype, self.rope)

    def longest(self, max_model_len: int | None) -> int:
        """Maximum number of tokens of a sequence: ``max_model_len``, or the whole context when it is None.

        Raises:
            InvalidRequest: ``max_model_len`` exceeds the context.
        """
        if max_model_len is not None and max_model_len > self.max_positions:
            raise InvalidRequest(
                "max_model_len", f"{max_model_len} is more than the model's context of {self.max_positions}"
            )
        return max_model_len or self.max_positions


def read_json(path: Path) -> dict[str, Any]:
    """Reads a file of a checkpoint that holds a JSON object; raises InvalidPair if it is missing or something else."""
    check_link(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InvalidPair(f"{path} is missing") from None
    except (ValueError, OSError) as error:
        raise InvalidPair(f"{path} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise InvalidPair(f"{path} holds a {type(content).__name__}, not a JSON object")
    return content


def check_link(path: Path) -> None:
    """Raises InvalidPair if ``path`` is a link to nothing, as in a pair that was moved without its checkpoints."""
    if path.is_symlink() and not path.exists():
        raise InvalidPair(
            f"{path} is a link to {os.readlink(path)}, which does not exist: a pair with links must move together with "
            "its checkpoints"
        )


def _model_type(hf_config: Mapping[str, Any]) -> str:
    architectures = _required(hf_config, "architectures")
    for name in architectures if isinstance(architectures, list) else [architectures]:
        if name in ARCHITECTURES:
            return ARCHITECTURES[name]
    raise _unsupported("architectures", architectures, "supported are " + ", ".join(ARCHITECTURES))


def _refuse_unsupported(hf_config: Mapping[str, Any], model_type: str, max_positions: int) -> None:
    if (activation := hf_config.get("hidden_act", "silu")) != "silu":
        raise _unsupported("hidden_act", activation, "only silu is supported")
    for key in _EXPERT_KEYS:
        if hf_config.get(key):
            raise _unsupported(key, hf_config[key], "mixtures of experts are not supported")
    other = sorted(set(hf_config.get("layer_types") or ()) - {"full_attention"})
    if other:
        raise _unsupported("layer_types", ", ".join(other), "every layer must be full_attention")
    if model_type == "mistral":
        # As in transformers, an absent key means the first Mistral's window; null means no window.
        window = hf_config.get("sliding_window", 4096)
        if window is not None and window < max_positions:
            raise _unsupported("sliding_window", window, f"is shorter than max_position_embeddings={max_positions}")
    elif model_type.startswith("qwen") and hf_config.get("use_sliding_window"):
        raise _unsupported("use_sliding_window", True, "sliding windows are not supported")


def _weight_format(hf_config: Mapping[str, Any]) -> WeightFormat:
    options = hf_config.get("quantization_config")
    if options is None:
        return "plain"
    method = options.get("quant_method") if isinstance(options, Mapping) else options
    for known in get_args(WeightFormat):
        if method == known != "plain":
            return cast(WeightFormat, known)
    raise _unsupported("quantization_config.quant_method", method, "known are fp8, awq, gptq, compressed-tensors")


def _num_kv_heads(hf_config: Mapping[str, Any], model_type: str, num_heads: int) -> int:
    # Llama checkpoints older than grouped-query attention lack the key. Null means one KV head per head.
    if model_type == "llama" and "num_key_value_heads" not in hf_config:
        return num_heads
    if "num_key_value_heads" in hf_config and hf_config["num_key_value_heads"] is None:
        return num_heads
    return _count(hf_config, "num_key_value_heads")


def _head(hf_config: Mapping[str, Any], vocab_size: int, hidden_size: int) -> tuple[int, int, bytes]:
    """``head_tokens``, ``tail_rank`` and ``head_mask``."""
    options = hf_config.get(HEAD_KEY)
    if options is None:
        return vocab_size, 0, b""
    if not isinstance(options, Mapping) or hf_config.get("tie_word_embeddings"):
        raise InvalidPair(f"{HEAD_KEY} in config.json must be an object, and the head must not be tied")
    tokens, rank = _count(options, "tokens"), _count(options, "tail_rank")
    if tokens >= vocab_size or rank >= hidden_size:
        raise InvalidPair(f"{HEAD_KEY} in config.json: tokens={tokens} and tail_rank={rank} do not fit the sizes")
    try:
        mask = b64decode(options.get("whole", ""), validate=True)
    except (TypeError, ValueError):
        raise InvalidPair(f"{HEAD_KEY} in config.json: whole is not base64") from None
    bits = int.from_bytes(mask, "little")
    if mask and (len(mask) != (vocab_size + 7) // 8 or bits.bit_length() > vocab_size or bits.bit_count() != tokens):
        raise InvalidPair(f"{HEAD_KEY} in config.json: whole does not name {tokens} tokens of {vocab_size}")
    return tokens, rank, mask


def _head_dim(hf_config: Mapping[str, Any], model_type: str, hidden_size: int, num_heads: int) -> int:
    if hf_config.get("head_dim") is not None or model_type == "qwen3":
        return _count(hf_config, "head_dim")
    return hidden_size // num_heads


def _rope(hf_config: Mapping[str, Any], max_positions: int) -> RopeSpec:
    # Old configs have `rope_theta` and a `rope_scaling` that may be null; new ones have `rope_parameters`.
    options: dict[str, Any] = dict(hf_config.get("rope_scaling") or hf_config.get("rope_parameters") or {})
    rope_type = options.get("rope_type", options.get("type", "default"))
    nested = [key for key, value in options.items() if isinstance(value, Mapping)]
    if nested:
        raise _unsupported("rope_parameters", ", ".join(nested), "one RoPE for all layers is supported")
    if rope_type not in _ROPE_TYPES:
        raise _unsupported("rope_type", rope_type, "supported are " + ", ".join(_ROPE_TYPES))
    for key in ("rope_theta", "partial_rotary_factor"):
        if options.get(key) is None:
            options[key] = hf_config.get(key)
    if options["partial_rotary_factor"] not in (None, 1):
        raise _unsupported("partial_rotary_factor", options["partial_rotary_factor"], "only 1 is supported")
    theta = _number(options, "rope_theta") if options["rope_theta"] is not None else 10000.0
    if rope_type == "default":
        return RopeSpec(theta=theta)
    original = hf_config.get("original_max_position_embeddings") or options.get("original_max_position_embeddings")
    original = int(original or max_positions)
    if rope_type == "linear":
        return RopeSpec("linear", theta, factor=_number(options, "factor"))
    if rope_type == "llama3":
        return RopeSpec(
            "llama3",
            theta,
            factor=_number(options, "factor"),
            low_freq_factor=_number(options, "low_freq_factor"),
            high_freq_factor=_number(options, "high_freq_factor"),
            original_max_positions=original,
        )
    factor = max_positions / original if options.get("factor") is None else _number(options, "factor")
    return RopeSpec(
        "yarn",
        theta,
        factor=factor,
        original_max_positions=original,
        beta_fast=float(options.get("beta_fast") or 32),
        beta_slow=float(options.get("beta_slow") or 1),
        attention_factor=_yarn_attention_factor(options, factor),
        truncate=bool(options.get("truncate", True)),
    )


def _yarn_attention_factor(options: Mapping[str, Any], factor: float) -> float:
    """Factor on cos and sin: the stated one, or computed from ``factor`` (arXiv 2309.00071, equation 22)."""
    if options.get("attention_factor") is not None:
        return _number(options, "attention_factor")

    def scale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    mscale, all_dim = options.get("mscale"), options.get("mscale_all_dim")
    return scale(mscale) / scale(all_dim) if mscale and all_dim else scale(1.0)


def eos_ids(hf_config: Mapping[str, Any]) -> tuple[int, ...]:
    """Returns the end-of-sequence ids that a config names; none if it names none."""
    ids = hf_config.get("eos_token_id")
    if ids is None:
        return ()
    return tuple(int(i) for i in ids) if isinstance(ids, list) else (int(ids),)


def _required(hf_config: Mapping[str, Any], name: str) -> Any:
    if hf_config.get(name) is None:
        raise InvalidPair(f"the model's config lacks {name!r}")
    return hf_config[name]


def _count(hf_config: Mapping[str, Any], name: str) -> int:
    value = _required(hf_config, name)
    if not isinstance(value, int) or value < 1:
        raise InvalidPair(f"the model's config has {name}={value!r}; it must be a positive integer")
    return value


def _number(hf_config: Mapping[str, Any], name: str) -> float:
    value = _required(hf_config, name)
    if not isinstance(value, (int, float)) or not value > 0:
        raise InvalidPair(f"the model's config has {name}={value!r}; it must be a positive number")
    return float(value)


def _unsupported(option: str, value: object, hint: str) -> UnsupportedModel:
    return UnsupportedModel(f"{option}={value!r} is not supported: {hint}")

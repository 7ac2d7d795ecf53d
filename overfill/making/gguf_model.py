"""Converts a Llama GGUF to an ordinary Hugging Face checkpoint with dequantised weights.

Weights become float32. A Q4_1 element is a float16 scale times four bits plus a float16 offset, and bfloat16 would drop
bits of that. The result depends on the file's bytes only.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from overfill.errors import InvalidPair
from overfill.making.checkpoint import write_json, write_weights
from overfill.telemetry.progress import Report, silent

_OUTER_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def convert_gguf(file: Path, out: Path, report: Report = silent) -> None:
    """Writes the model, the tokenizer and the generation defaults of the GGUF ``file`` to the folder ``out``.

    Raises:
        InvalidPair: the file is not a GGUF, or its model is not a Llama with a byte-level BPE tokenizer.
    """
    try:
        reader = gguf.GGUFReader(file)
    except (OSError, ValueError) as error:
        raise InvalidPair(f"{file}: not a GGUF file: {error}") from None
    fields = _Fields(file, reader)
    for name, expected in (("general.architecture", "llama"), ("tokenizer.ggml.model", "gpt2")):
        if fields[name] != expected:
            raise InvalidPair(f"{file}: {name} is {fields[name]!r}; only {expected!r} can be converted")
    heads = {
        "attn_q": fields["llama.attention.head_count"],
        "attn_k": fields["llama.attention.head_count_kv"],
    }
    tensors = {}
    for index, stored in enumerate(reader.tensors):
        part, name = _translate(stored.name)
        values = gguf.dequantize(stored.data, stored.tensor_type)
        if part in heads:
            values = _half_split(values, heads[part])
        # Copies, because unquantised tensors are read-only views of the file.
        tensors[name] = torch.from_numpy(np.array(values, dtype=np.float32, order="C"))
        report("Converting the full model", index + 1, len(reader.tensors))
    write_weights(out, tensors)
    special_ids = {
        name: fields[f"tokenizer.ggml.{ours}_token_id"]
        for name, ours in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("unk", "unknown"))
    }
    generation = {f"{name}_token_id": special_ids[name] for name in ("bos", "eos", "pad")}
    write_json(out / "config.json", _config(fields, tied="lm_head.weight" not in tensors) | generation)
    write_json(out / "generation_config.json", generation)
    _write_tokenizer(fields, special_ids, out)


class _Fields:
    """The metadata fields of a GGUF file; a missing field raises InvalidPair."""

    def __init__(self, file: Path, reader: gguf.GGUFReader) -> None:
        self._file = file
        self._reader = reader

    def __getitem__(self, name: str) -> Any:
        field = self._reader.get_field(name)
        if field is None:
            raise InvalidPair(f"{self._file}: lacks {name}")
        return field.contents()


def _translate(name: str) -> tuple[str, str]:
    """Returns a tensor's part (``attn_q``, …) and its Hugging Face name."""
    match name.split("."):
        case ["blk", layer, part, "weight"] if part in _LAYER_NAMES:
            return part, f"model.layers.{layer}.{_LAYER_NAMES[part]}.weight"
        case [part, "weight"] if part in _OUTER_NAMES:
            return part, f"{_OUTER_NAMES[part]}.weight"
    raise InvalidPair(f"tensor {name} of the GGUF is not one of a Llama; only Llamas can be converted")


def _half_split(values: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """Reorders rows for RoPE: GGUF rotates neighbouring rows together, Hugging Face rows of a head's two halves."""
    rows, columns = values.shape
    return values.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def _config(fields: _Fields, tied: bool) -> dict[str, Any]:
    hidden_size, num_heads = fields["llama.embedding_length"], fields["llama.attention.head_count"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "float32",
        "vocab_size": fields["llama.vocab_size"],
        "hidden_size": hidden_size,
        "intermediate_size": fields["llama.feed_forward_length"],
        "num_hidden_layers": fields["llama.block_count"],
        "num_attention_heads": num_heads,
        "num_key_value_heads": fields["llama.attention.head_count_kv"],
        "head_dim": hidden_size // num_heads,
        "hidden_act": "silu",
        "max_position_embeddings": fields["llama.context_length"],
        # The file has float32; its shortest decimal form is the original number.
        "rms_norm_eps": float(str(np.float32(fields["llama.attention.layer_norm_rms_epsilon"]))),
        "rope_theta": float(fields["llama.rope.freq_base"]),
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": tied,
    }


def _write_tokenizer(fields: _Fields, special_ids: dict[str, int], out: Path) -> None:
    tokens: list[str] = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if fields["tokenizer.ggml.pre"] == "smollm":
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(True), byte_level])
    else:
        tokenizer.pre_tokenizer = byte_level
    tokenizer.decoder = decoders.ByteLevel()
    kinds = zip(tokens, fields["tokenizer.ggml.token_type"], strict=True)
    control = [
        AddedToken(token, special=True, normalized=False) for token, kind in kinds if kind == gguf.TokenType.CONTROL
    ]
    tokenizer.add_special_tokens(control)
    tokenizer.save(str(out / "tokenizer.json"))
    (out / "chat_template.jinja").write_text(fields["tokenizer.chat_template"], encoding="utf-8")
    write_json(
        out / "tokenizer_config.json",
        {f"{name}_token": tokens[token] for name, token in special_ids.items()}
        | {
            "add_prefix_space": False,
            "clean_up_tokenization_spaces": False,
            "model_max_length": fields["llama.context_length"],
            "tokenizer_class": "PreTrainedTokenizerFast",
        },
    )

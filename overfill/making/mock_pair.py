"""Makes the pair that ships for the mock engine: a tokenizer and configs, no weights. ``python -m`` runs it.

The tokenizer is a byte-level BPE of the conversations that the package ships, with the special tokens of the families
that OverFill serves, so that a script can play each family's raw output.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from overfill import pair
from overfill.making.conversations import ShippedPart, shipped_conversations
from overfill.making.pair_json import write_manifest

FOLDER = Path(pair.__file__).parent / "mock"

VOCAB_SIZE = 6144
"""Rows of the embedding that the model would have: the tokens, and rows without a token up to a multiple of 1,024."""
MERGED_TOKENS = 6000
CONTEXT = 131_072

SPECIAL = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>",  # ChatML, Qwen
    "<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>",
    "<|python_tag|>",  # Llama 3
    "<s>", "</s>", "<unk>", "[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[AVAILABLE_TOOLS]",
    "[/AVAILABLE_TOOLS]", "[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]", "[TOOL_CONTENT]", "[CALL_ID]", "[ARGS]",
    "[THINK]", "[/THINK]",  # Mistral
)  # fmt: skip
"""Special tokens, which answers do not show."""
SHOWN = ("<think>", "</think>")
"""Added tokens of Qwen 3 that answers show. The tags of tool calls are text, as the grammar of calls has them."""
END = ("<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>", "</s>")
"""Tokens that end an answer; the first one is the tokenizer's own."""

TEMPLATE = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""


def make_tokenizer() -> Tokenizer:
    """Trains the tokenizer. The result is the same in every run."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=MERGED_TOKENS, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(_texts(), trainer)
    tokenizer.add_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL])
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in SHOWN])
    return tokenizer


def make(folder: Path) -> None:
    """Writes the pair into ``folder``."""
    tokenizer = make_tokenizer()
    model = folder / "model"
    model.mkdir(exist_ok=True)
    tokenizer.save(str(model / "tokenizer.json"), pretty=False)
    ids = tokenizer.get_vocab()
    end = [ids[text] for text in END]
    _write(model / "config.json", _config(end))
    _write(model / "generation_config.json", {"eos_token_id": end})
    _write(model / "tokenizer_config.json", {"eos_token": END[0], "clean_up_tokenization_spaces": False})
    (model / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    config = (model / "config.json").read_bytes()
    digest = hashlib.sha256(config + (model / "tokenizer.json").read_bytes()).hexdigest()  # there are no tensors
    write_manifest(folder, full="model", decoder="model", full_digest=digest, decoder_digest=digest)


def _config(end: list[int]) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 2,
        "intermediate_size": 2,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "head_dim": 2,
        "rms_norm_eps": 1e-05,
        "rope_theta": 10000.0,
        "max_position_embeddings": CONTEXT,
        "tie_word_embeddings": True,
        "hidden_act": "silu",
        "eos_token_id": end,
    }


def _texts() -> Iterator[str]:
    parts: tuple[ShippedPart, ...] = ("calibration", "development")  # those of when the shipped tokenizer was trained
    for part in parts:
        for conversation in shipped_conversations(part):
            yield from (message["content"] for message in conversation.messages)


def _write(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    make(FOLDER)

"""Small tokenizers of the two supported families: byte-level BPE, and SentencePiece-like with byte fallback."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers

SPECIAL = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
CORPUS = [
    "The quick brown fox jumps over the lazy dog. Hello, world! How are you today?",
    "Grüße aus Köln, naïve café. Привет, как дела? 你好，世界。 こんにちは 안녕하세요 שלום مرحبا 👋🏽🌍",
    "def main():\n    return 42\n",
]
CHAT_TEMPLATE = """{{ bos_token }}
{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}"""

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hello, <b>world</b>! 你好 👋🏽"},
    {"role": "assistant", "content": "Hi."},
    {"role": "user", "content": "  two  spaces\n"},
]
TEMPLATES = [
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ eos_token }}{% endfor %}",
    "{% for m in messages %}\n    {% if loop.index0 == 2 %}{% break %}{% endif %}\n{{ m | tojson }}\n{% endfor %}",
    "{{ messages | tojson(indent=2) }}{% if add_generation_prompt %}GO{% endif %}",
    "{% if tools is none and documents is none and not x is defined %}{{ messages[0].content }}{% endif %}",
    "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
    "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
    "{{ strftime_now('%Y') }} {{ messages[1].content | trim | upper }}",
]
"""Templates that use Jinja in ways of real ones, for ``CHAT``."""


def byte_level() -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(CORPUS * 3, trainer)
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
    )
    return backend


def sentencepiece_like() -> tokenizers.Tokenizer:
    tokens = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))]
    tokens += ["▁", *"abcdehlorwy.,!", "▁h", "▁he", "ll", "▁hell", "▁hello", "▁w", "or", "▁wor", "ld", "▁world"]
    pairs = [("▁", "h"), ("▁h", "e"), ("l", "l"), ("▁he", "ll"), ("▁hell", "o"), ("▁", "w"), ("o", "r")]
    pairs += [("▁w", "or"), ("l", "d"), ("▁wor", "ld")]
    vocab = {token: index for index, token in enumerate(tokens)}
    backend = tokenizers.Tokenizer(models.BPE(vocab, pairs, unk_token="<unk>", byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    return backend


def write_checkpoint(folder: Path, backend: tokenizers.Tokenizer, **tokenizer_config: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    config = {
        "bos_token": "<s>",
        "eos_token": {"__type": "AddedToken", "content": "</s>", "special": True},
    } | tokenizer_config
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "config.json").write_text(
        json.dumps({"vocab_size": backend.get_vocab_size() + 8, "eos_token_id": 2, "model_type": "llama"})
    )
    return folder

"""Loads checkpoints as plain transformers models, which share no forward pass with ``overfill.model``."""

from __future__ import annotations

import inspect
import json
from base64 import b64decode
from pathlib import Path

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from overfill.errors import InvalidPair
from overfill.model.config import HEAD_KEY, ModelConfig

# Shared with the engine, because both sides must round the same factors.
from overfill.model.head import low_rank_factors, tokens_in_row_order
from overfill.pair.hf_config import loadable_config


def load_hf_model(folder: Path) -> PreTrainedModel:
    """Loads the causal language model in ``folder``, in float32 and evaluation mode.

    A Llama whose hidden size transformers refuses is loaded as the equal Mistral (``hf_config``).

    Raises:
        InvalidPair: transformers cannot load it.
        UnsupportedModel: the weights are quantised in the files, or transformers refuses the Llama's hidden size and no
            equal Mistral exists.
    """
    ModelConfig.load(folder).check_plain(folder)
    # The progress bar of transformers would interleave with ours.
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            folder, config=_replaced_config(folder), dtype=torch.float32
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise InvalidPair(f"{folder}: transformers cannot load this model: {error}") from error
    finally:
        if shown:
            logging.enable_progress_bar()
    model.eval()
    return model


def cache_argument(model: PreTrainedModel) -> str:
    """Returns the name of the forward pass's argument for the KV cache, which transformers 5 renamed."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


@torch.no_grad()
def round_to_int8(model: PreTrainedModel) -> None:
    """Rounds every projection and the head to the values that int8 can hold.

    Each row has one scale: its largest absolute value divided by 127. A tied head is rounded and the embedding is not.
    In a head in two parts, the factors of the low-rank part are rounded.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear) and module is not model.lm_head:
            module.weight = _rounded(module.weight)
    parts = getattr(model.config, HEAD_KEY, None)
    head = model.lm_head.weight
    if parts is None:
        model.lm_head.weight = _rounded(head)
        return
    rest = tokens_in_row_order(len(head), b64decode(parts.get("whole", "")))[parts["tokens"] :]
    left, right = low_rank_factors(head[rest], parts["tail_rank"])
    rounded = _rounded(head)
    rounded[rest] = _rounded(left) @ _rounded(right)
    model.lm_head.weight = rounded


def _rounded(weight: torch.Tensor) -> nn.Parameter:
    scale = (weight.abs().amax(1, keepdim=True) / 127).clamp(min=torch.finfo(torch.float32).tiny)
    return nn.Parameter((weight / scale).round() * scale, requires_grad=False)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Loads the tokenizer in ``folder``.

    Raises:
        InvalidPair: transformers cannot load it.
    """
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, config=_replaced_config(folder))
        return tokenizer
    except (OSError, ValueError) as error:
        raise InvalidPair(f"{folder}: transformers cannot load this tokenizer: {error}") from error


def chat_token_ids(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """Tokenizes ``prompt`` as one user turn of the chat template, or as plain text without a template.

    As in the router, texts of special tokens in the prompt of a chat stay text.
    """

    def ids(text: str, **how: bool) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False, **how)["input_ids"])

    def render(content: str) -> str:
        messages = [{"role": "user", "content": content}]
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))

    if tokenizer.chat_template is None:
        return list(tokenizer(prompt)["input_ids"])
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    if not any(token in prompt for token in special):
        return ids(render(prompt))
    # Only a whole text can be tokenized without special tokens: here, that between the template's last special token
    # before the prompt and its first one after it.
    before, _, after = render("probe").partition("probe")
    text = render(prompt)
    shown = text[len(before) : len(text) - len(after)]
    start = max((before.rfind(token) + len(token) for token in special if token in before), default=0)
    end = min((after.find(token) for token in special if token in after), default=len(after))
    turn = before[start:] + shown + after[:end]
    return ids(before[:start]) + ids(turn, split_special_tokens=True) + ids(after[end:])


def generation_prompt_tokens(tokenizer: PreTrainedTokenizerBase, prompt: str) -> int:
    """Returns how many tokens at the end of ``chat_token_ids`` have a part of the generation prompt."""
    if tokenizer.chat_template is None:
        return 0
    messages = [{"role": "user", "content": prompt}]
    before, text = (
        str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=added))
        for added in (False, True)
    )
    if not text.startswith(before):
        return 0
    spans = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    return sum(end > len(before) for _, end in spans)


def _replaced_config(folder: Path) -> PretrainedConfig | None:
    """Returns the config that replaces the checkpoint's own, or None when transformers accepts its own."""
    found = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    loadable = loadable_config(found)
    return None if loadable == found else AutoConfig.for_model(**loadable)

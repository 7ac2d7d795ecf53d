"""Checkpoints as plain transformers models, which owe nothing to ``overfill.model``."""

from __future__ import annotations

import json
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
from overfill.pair.hf_config import loadable_config


def load_plain(folder: Path) -> PreTrainedModel:
    """The causal language model in ``folder``, in float32 and evaluation mode.

    A Llama whose hidden size transformers refuses is loaded as the equal Mistral.

    Raises:
        InvalidPair: transformers cannot load it.
        UnsupportedModel: it is a Llama whose hidden size transformers refuses, and there is no equal Mistral.
    """
    # Its bar for loading would interleave with ours.
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


@torch.no_grad()
def round_to_int8(model: PreTrainedModel) -> None:
    """Gives every projection and the head the values that int8 leaves of it: one scale per row, its largest over 127.

    A tied head is rounded by itself; the embedding stays.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear):
            scale = module.weight.abs().amax(1, keepdim=True) / 127
            scale = scale.clamp(min=torch.finfo(torch.float32).tiny)
            module.weight = nn.Parameter((module.weight / scale).round() * scale, requires_grad=False)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in ``folder``.

    Raises:
        InvalidPair: transformers cannot load it.
    """
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, config=_replaced_config(folder))
        return tokenizer
    except (OSError, ValueError) as error:
        raise InvalidPair(f"{folder}: transformers cannot load this tokenizer: {error}") from error


def chat_token_ids(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """``prompt`` as one user turn in the checkpoint's chat template; as it is when there is no template."""
    if tokenizer.chat_template is None:
        return list(tokenizer(prompt)["input_ids"])
    messages = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _replaced_config(folder: Path) -> PretrainedConfig | None:
    """What to load the checkpoint with; None where its own config will do."""
    found = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    loadable = loadable_config(found)
    return None if loadable == found else AutoConfig.for_model(**loadable)

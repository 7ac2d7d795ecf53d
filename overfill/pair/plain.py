"""Checkpoints as plain transformers models, which owe nothing to ``overfill.model``."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from overfill.errors import InvalidPair


def load_plain(folder: Path) -> PreTrainedModel:
    """The causal language model in ``folder``, in float32 and evaluation mode.

    Raises:
        InvalidPair: transformers cannot load it.
    """
    # Its bar for loading would interleave with ours.
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    except (OSError, ValueError, RuntimeError) as error:
        raise InvalidPair(f"{folder}: transformers cannot load this model: {error}") from error
    finally:
        if shown:
            logging.enable_progress_bar()
    model.eval()
    return model


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in ``folder``.

    Raises:
        InvalidPair: transformers cannot load it.
    """
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
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

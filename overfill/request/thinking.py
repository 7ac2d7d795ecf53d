"""How an answer thinks before it answers: the tokens around the thinking. No text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

ReasoningParser = Literal["auto", "none", "qwen3", "deepseek_r1", "mistral"]
"""Formats of reasoning, by vLLM's names; "auto" means the one that the chat template shows."""


@dataclass(frozen=True, slots=True)
class ThinkingTokens:
    """The tokens around what a model thinks at the beginning of an answer.

    Attributes:
        begin: id of the token that opens it.
        end: id of the token that closes it.
        opened: whether the prompt has opened it, so that the answer begins inside.
    """

    begin: int
    end: int
    opened: bool

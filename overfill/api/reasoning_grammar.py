"""Lets a model think before an answer that follows a grammar."""

from __future__ import annotations

import json
import re

from overfill.request.json_schemas import compact
from overfill.request.params import Grammar
from overfill.request.thinking import ThinkingTokens


def after_thinking(grammar: Grammar, thinking: ThinkingTokens) -> Grammar:
    """Returns a grammar in Lark of any thinking, then of an answer in ``grammar``.

    The thinking has no special tokens, so it cannot be mistaken for an answer. An answer whose prompt has not opened it
    may leave it out.

    Args:
        grammar: has been tried alone.
    """
    thought = f"THOUGHT? <[{thinking.end}]> SPACE?"
    if not thinking.opened:
        thought = f"(<[{thinking.begin}]> {thought})?"
    lines = [
        "%llguidance {}",
        f"start: {thought} answer",
        r"THOUGHT: /(.|\n)+/",
        r"SPACE: /\s{1,8}/",
        f"answer: {_nested(grammar)}",
    ]
    return Grammar("lark", "\n".join(lines) + "\n")


def _nested(grammar: Grammar) -> str:
    """Returns ``grammar`` as the body of a rule."""
    match grammar.kind:
        case "json_object":
            return f"%json {json.dumps(compact({'type': 'object'}))}"
        case "json_schema":
            return f"%json {json.dumps(compact(json.loads(grammar.text)))}"
        case "regex":
            return regex_in_lark(grammar.text)
        case "lark":
            return f"%lark {{\n{grammar.text}\n}}"


def regex_in_lark(regex: str) -> str:
    """Returns ``regex`` between slashes. There, a slash has a backslash before it, and no line ends after one."""
    return "/" + re.sub(r"(?s)(\\.)|/", lambda part: (part[1] or r"\/").replace("\n", "n"), regex) + "/"

"""Chooses the format of a model's tool calls: by name, or by its chat template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from overfill.api.families.hermes import Hermes
from overfill.api.families.tool_format import ToolFormat
from overfill.request.names import ToolCallParser

_FORMATS: dict[str, type[ToolFormat]] = {format.name: format for format in (Hermes,)}


def choose_format(parser: ToolCallParser, template: str, special: Mapping[str, int]) -> ToolFormat:
    """The format of a model's calls.

    Args:
        parser: name of the format; "auto" chooses by ``template``.
        template: source of the chat template; "" if there is none.
        special: ids of the tokenizer's special tokens, by text.
    """
    name = _detected(template) if parser == "auto" else parser
    return make_format(name, [special.get(text) for text in _FORMATS[name].special])


def make_format(name: str, ids: Sequence[int | None]) -> ToolFormat:
    """The format whose ``name`` and ``ids`` these are."""
    return _FORMATS[name](ids)


def _detected(template: str) -> str:
    return Hermes.name

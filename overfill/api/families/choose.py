"""Chooses the format of a model's tool calls: by name, or by its chat template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from overfill.api.families.hermes import Hermes
from overfill.api.families.llama3_json import Llama3Json
from overfill.api.families.mistral import Mistral, MistralArgs
from overfill.api.families.pythonic import Pythonic
from overfill.api.families.qwen3_coder import Qwen3Coder
from overfill.api.families.tool_format import ToolFormat
from overfill.request.names import ToolCallParser

_FORMATS: dict[str, type[ToolFormat]] = {
    format.name: format for format in (Hermes, Llama3Json, Pythonic, Mistral, MistralArgs, Qwen3Coder)
}

# Texts that tell a template's format, in the order in which they are looked for.
_SIGNS = (
    ("<parameter=", Qwen3Coder.name),
    ("[TOOL_CALLS]", Mistral.name),
    ("<tool_call>", Hermes.name),
    ("func_name1(", Pythonic.name),
    ('"parameters": dictionary of argument name', Llama3Json.name),
    ("<|python_tag|>", Llama3Json.name),
)


def choose_format(parser: ToolCallParser, template: str, special: Mapping[str, int]) -> ToolFormat:
    """The format of a model's calls.

    Args:
        parser: name of the format; "auto" chooses by ``template``.
        template: source of the chat template; "" if there is none.
        special: ids of the tokenizer's special and other added tokens, by text.
    """
    name: str = parser
    if parser == "auto":
        name = next((format for sign, format in _SIGNS if sign in template), Hermes.name)
    if name == Mistral.name and ("[ARGS]" in template if template else "[ARGS]" in special):
        name = MistralArgs.name
    return make_format(name, [special.get(text) for text in _FORMATS[name].special])


def make_format(name: str, ids: Sequence[int | None]) -> ToolFormat:
    """The format whose ``name`` and ``ids`` these are."""
    return _FORMATS[name](ids)

"""Calls as Mistral's models write them after a special token: a list of JSON objects, or names and JSON objects.

::

    [TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Paris"}}]
    [TOOL_CALLS]weather[ARGS]{"city": "Paris"}[TOOL_CALLS]now[ARGS]{}
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar

from overfill.api.families.call_text import CallText
from overfill.api.families.parameters import KnownTools
from overfill.api.families.tool_format import NO_TOOLS, CallRules, Expressions, ToolFormat
from overfill.api.tools import ToolDefinition

_HEAD, _ARGUMENTS = '{"name": "', '", "arguments": '
_ID = re.compile("[a-zA-Z0-9]{9}")


class Mistral(ToolFormat):
    """Mistral's first format: one list of all calls."""

    name = "mistral"
    special: ClassVar[tuple[str, ...]] = ("[TOOL_CALLS]",)
    instruction = "To call functions, answer with nothing but a list of JSON objects with their names and arguments:"

    def rules(self, tools: Sequence[ToolDefinition], expressions: Expressions) -> CallRules:
        return CallRules(
            [([tool.name + _ARGUMENTS], expressions.arguments(tool)) for tool in tools],
            marker=self._markers[0],
            lead='" "? "["',
            before=[_HEAD],
            after=r'(", \"id\": \"" /[a-zA-Z0-9]{9}/ "\"")? "}"',
            separator='", "',
            closing='"]"',
        )

    def openings(self, tools: Sequence[ToolDefinition]) -> Mapping[str, bool]:
        begin = self._markers[0]
        if begin.is_token:
            return {begin.shown: False}
        return {f"{begin.text}{space}[{_HEAD}": False for space in (" ", "")}  # JSON has quotes in strings as escapes

    def read(self, text: CallText, tools: KnownTools) -> Iterator[None]:
        return text.json_calls(_HEAD, _ARGUMENTS, "}")

    def write(self, calls: Sequence[tuple[str, str]], tools: KnownTools = NO_TOOLS) -> str:
        listed = ", ".join(f"{_HEAD}{name}{_ARGUMENTS}{arguments}}}" for name, arguments in calls)
        return f"{self._markers[0].text} [{listed}]"

    def template_id(self, id: str) -> str:
        return id if _ID.fullmatch(id) else hashlib.sha256(id.encode()).hexdigest()[:9]


class MistralArgs(Mistral):
    """Mistral's second format: a special token before each call, and one before its arguments."""

    name = "mistral_args"
    special = ("[TOOL_CALLS]", "[ARGS]")
    instruction = "To call functions, answer with nothing but their names and their arguments as JSON objects:"

    def rules(self, tools: Sequence[ToolDefinition], expressions: Expressions) -> CallRules:
        begin, args = self._markers
        return CallRules(
            [([tool.name], f"{args.lark} {expressions.arguments(tool)}") for tool in tools],
            marker=begin,
            separator=begin.lark,
        )

    def openings(self, tools: Sequence[ToolDefinition]) -> Mapping[str, bool]:
        begin, args = self._markers
        if begin.is_token:
            return {begin.shown: False}
        return {f"{begin.text}{tool.name}{args.shown}{object}": False for tool in tools for object in ('{"', "{}")}

    def read(self, text: CallText, tools: KnownTools) -> Iterator[None]:
        begin, args = self._markers
        return text.json_calls(begin.shown, args.shown, "")

    def write(self, calls: Sequence[tuple[str, str]], tools: KnownTools = NO_TOOLS) -> str:
        begin, args = self._markers
        return "".join(f"{begin.text}{name}{args.text}{arguments}" for name, arguments in calls)

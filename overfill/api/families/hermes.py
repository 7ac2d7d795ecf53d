"""Calls as models of Hermes, Qwen 2.5, Qwen 3 and SmolLM write them: JSON objects in tags.

::

    <tool_call>
    {"name": "weather", "arguments": {"city": "Paris"}}
    </tool_call>
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence

from overfill.api.families.call_text import CallText
from overfill.api.families.parameters import KnownTools
from overfill.api.families.tool_format import NO_TOOLS, CallRules, Expressions, ToolFormat
from overfill.api.tools import ToolDefinition

_HEAD, _ARGUMENTS, _TAIL = '\n{"name": "', '", "arguments": ', "}\n"


class Hermes(ToolFormat):
    """Hermes: ``<tool_call>`` and ``</tool_call>`` around an object with ``name`` and ``arguments``."""

    name = "hermes"
    special = ("<tool_call>", "</tool_call>")
    instruction = "To call a function, answer with nothing but a JSON object with its name and arguments in tags:"

    def rules(self, tools: Sequence[ToolDefinition], expressions: Expressions) -> CallRules:
        begin, end = self._markers
        return CallRules(
            [([tool.name + _ARGUMENTS], expressions.arguments(tool)) for tool in tools],
            marker=begin,
            before=[_HEAD],
            after=f"{json.dumps(_TAIL)} {end.lark}",
            separator=f'"\\n" {begin.lark}',
        )

    def openings(self, tools: Sequence[ToolDefinition]) -> Mapping[str, bool]:
        return {self._markers[0].shown + _HEAD: False}

    def read(self, text: CallText, tools: KnownTools) -> Iterator[None]:
        begin, end = self._markers
        return text.json_calls(begin.shown + _HEAD, _ARGUMENTS, _TAIL + end.shown)

    def write(self, calls: Sequence[tuple[str, str]], tools: KnownTools = NO_TOOLS) -> str:
        begin, end = self._markers
        return "\n".join(
            f"{begin.text}{_HEAD}{name}{_ARGUMENTS}{arguments}{_TAIL}{end.text}" for name, arguments in calls
        )

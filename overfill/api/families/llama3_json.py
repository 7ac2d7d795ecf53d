"""Calls as Llama 3.1 to 3.3 write them: JSON objects, after a special token or at the beginning of a line.

::

    {"name": "weather", "parameters": {"city": "Paris"}}; {"name": "now", "parameters": {}}
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from overfill.api.families.call_text import CallText
from overfill.api.families.parameters import KnownTools
from overfill.api.families.tool_format import NO_TOOLS, CallRules, Expressions, ToolFormat
from overfill.api.tools import ToolDefinition

_HEAD, _ARGUMENTS = '{"name": "', '", "parameters": '


class Llama3Json(ToolFormat):
    """Llama's JSON: objects with ``name`` and ``parameters``, separated by semicolons."""

    name = "llama3_json"
    special = ("<|python_tag|>",)
    most_in_template = 1
    instruction = "To call a function, answer with nothing but a JSON object with its name and parameters:"

    def rules(self, tools: Sequence[ToolDefinition], expressions: Expressions) -> CallRules:
        (tag,) = self._markers
        return CallRules(
            [([f'"{tool.name}"', ", ", '"parameters"', ": "], expressions.arguments(tool)) for tool in tools],
            marker=tag if tag.is_token else None,
            before=["{", '"name"', ": "],
            after='"}"',
            separator='"; "',
            bare="",
        )

    def openings(self, tools: Sequence[ToolDefinition]) -> Mapping[str, bool]:
        (tag,) = self._markers
        tags = {tag.shown: False} if tag.is_token else {}
        return tags | {f"{_HEAD}{tool.name}{_ARGUMENTS}": True for tool in tools}

    def read(self, text: CallText, tools: KnownTools) -> Iterator[None]:
        return text.json_calls(_HEAD, _ARGUMENTS, "}")

    def write(self, calls: Sequence[tuple[str, str]], tools: KnownTools = NO_TOOLS) -> str:
        return "; ".join(f"{_HEAD}{name}{_ARGUMENTS}{arguments}}}" for name, arguments in calls)

"""Tools that a model may call, checked. Text and JSON only; no tokens, no wire, no format of calls."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from overfill.errors import InvalidRequest
from overfill.request.params import Grammar

MAX_TOOLS = 128

TEXT_PARAMETER = "input"
"""The only parameter of a tool that takes text."""

_NAME = re.compile(r"[a-zA-Z0-9_-]{1,128}")

Mode = Literal["auto", "none", "required"]


@dataclass(frozen=True, slots=True)
class ToolDefinition:
    """A function that the model may call.

    Args:
        parameters: JSON schema of its arguments object.
        strict: Whether a schema that a grammar cannot enforce in full is an error.
        input: Grammar of the text that the tool takes; its only parameter is then ``TEXT_PARAMETER``.
    """

    name: str
    description: str = ""
    parameters: Mapping[str, Any] = field(default_factory=lambda: {"type": "object", "properties": {}})
    strict: bool = False
    input: Grammar | None = None


def check_count(count: int) -> None:
    """Raises InvalidRequest if ``count`` tools are too many."""
    if count > MAX_TOOLS:
        raise InvalidRequest("chat.tools", f"has {count} tools; at most {MAX_TOOLS} are allowed")


def check_tools(tools: Sequence[ToolDefinition]) -> None:
    """Raises InvalidRequest if a name is invalid or used twice, or parameters do not describe an object."""
    check_count(len(tools))
    seen: set[str] = set()
    for index, tool in enumerate(tools):
        place = f"chat.tools[{index}]"
        if not _NAME.fullmatch(tool.name):
            raise InvalidRequest(f"{place}.name", f"is {tool.name[:80]!r}; give 1 to 128 letters, digits, _ or -")
        if tool.name in seen:
            raise InvalidRequest(
                f"{place}.name", f"is {tool.name!r}, which is another tool's name too; give each tool its own name"
            )
        kind = tool.parameters.get("type", "object")
        if kind != "object" and not (isinstance(kind, list) and "object" in kind):
            raise InvalidRequest(f"{place}.parameters", f'has "type" {str(kind)[:80]!r}; it must be "object"')
        properties = tool.parameters.get("properties")
        if tool.input is not None and not (isinstance(properties, dict) and properties.keys() == {TEXT_PARAMETER}):
            raise InvalidRequest(f"{place}.parameters", f"of a tool with an input have {TEXT_PARAMETER!r} only")
        seen.add(tool.name)


def as_openai(tool: ToolDefinition) -> dict[str, Any]:
    """``tool`` in OpenAI's format, which chat templates expect."""
    function = {"name": tool.name, "description": tool.description, "parameters": dict(tool.parameters)}
    return {"type": "function", "function": function}

"""Tools: how a model is told about them, what it must write to call one, and how its calls are read back.

Calls are written as Hermes and Qwen models write them, one after the other at the end of an answer::

    <tool_call>
    {"name": "weather", "arguments": {"city": "Paris"}}
    </tool_call>

A grammar holds the model to exactly this, so that reading them cannot fail. Text and JSON only; no tokens, no wire.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from overfill.errors import InvalidRequest
from overfill.request.grammar import compact

BEGIN, END = "<tool_call>", "</tool_call>"
MAX_TOOLS = 128

_HEAD = f'{BEGIN}\n{{"name": "'
_ARGUMENTS = '", "arguments": '
_TAIL = f"}}\n{END}"
_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")

Mode = Literal["auto", "none", "required"]


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that the model may call; ``parameters`` is the JSON schema of its arguments, an object."""

    name: str
    description: str = ""
    parameters: Mapping[str, Any] = field(default_factory=lambda: {"type": "object", "properties": {}})


@dataclass(frozen=True, slots=True)
class ToolCallPart:
    """What a piece of an answer adds to one call: at first its name, then more of the arguments' JSON text."""

    index: int
    name: str = ""
    arguments: str = ""


def check_tools(tools: Sequence[Tool]) -> None:
    """Raises InvalidRequest, naming the field, when a name is bad or taken twice or parameters are no object."""
    if len(tools) > MAX_TOOLS:
        raise InvalidRequest("chat.tools", f"holds {len(tools)} tools; at most {MAX_TOOLS} are allowed")
    seen: set[str] = set()
    for index, tool in enumerate(tools):
        place = f"chat.tools[{index}]"
        if not _NAME.fullmatch(tool.name):
            raise InvalidRequest(f"{place}.name", f"has 1 to 64 letters, digits, _ and -; got {tool.name[:80]!r}")
        if tool.name in seen:
            raise InvalidRequest(f"{place}.name", f"is taken: another tool is called {tool.name!r}")
        if tool.parameters.get("type", "object") != "object":
            raise InvalidRequest(f"{place}.parameters", 'is the schema of an object: "type" must be "object"')
        seen.add(tool.name)


def describe_tools(tools: Sequence[Tool]) -> str:
    """For the system message of models whose chat template knows no tools."""
    lines = "\n".join(json.dumps(as_openai(tool), ensure_ascii=False) for tool in tools)
    return (
        "You may call functions. These are available, one JSON object per line:\n"
        f"<tools>\n{lines}\n</tools>\n"
        "To call a function, answer with nothing but a JSON object with its name and arguments in tags:\n"
        f'{BEGIN}\n{{"name": "function-name", "arguments": {{"argument-name": "value"}}}}\n{END}'
    )


def as_openai(tool: Tool) -> dict[str, Any]:
    """The form that chat templates expect."""
    function = {"name": tool.name, "description": tool.description, "parameters": dict(tool.parameters)}
    return {"type": "function", "function": function}


def write_calls(calls: Sequence[tuple[str, str]]) -> str:
    """Calls (name, arguments as JSON text) as the model writes them."""
    return "\n".join(f"{_HEAD}{name}{_ARGUMENTS}{arguments}{_TAIL}" for name, arguments in calls)


def tools_grammar(tools: Sequence[Tool], mode: Mode, *, single: bool) -> str:
    """A Lark grammar of answers that call ``tools``.

    Args:
        mode: "auto" allows text, and calls behind it; "required" wants nothing but calls.
        single: one call at most.
    """
    functions = []
    for tool in tools:
        # An object whatever the schema leaves open: `ToolCallReader` reads nothing else.
        schema = json.dumps(compact({"type": "object", **(tool.parameters or {"properties": {}})}))
        functions.append(f"{json.dumps(tool.name + _ARGUMENTS)} %json {schema}")
    more = "" if single else f' ("\\n" {json.dumps(BEGIN)} body)*'
    start = f"TEXT | first{more}" if mode == "auto" else f"{json.dumps(BEGIN)} body{more}"
    lines = [
        "%llguidance {}",
        f"start: {start}",
        f"body: {json.dumps(_HEAD.removeprefix(BEGIN))} function {json.dumps(_TAIL)}",
        "function: " + " | ".join(f"function_{i}" for i in range(len(functions))),
        *(f"function_{i}: {function}" for i, function in enumerate(functions)),
    ]
    if mode == "auto":
        lines += [
            "first: trigger body",
            f"trigger[lazy]: TEXT {json.dumps(BEGIN)}",
            r"TEXT: /(.|\n)*/",
        ]
    return "\n".join(lines) + "\n"


class ToolCallReader:
    """Takes an answer's text in pieces and tells its tool calls from its text.

    White space around calls belongs to neither. Text that only looks like the beginning of a call is text.
    """

    def __init__(self) -> None:
        self.calls = 0
        self._buffer = ""
        self._scanner: _ObjectScanner | None = None

    def push(self, text: str) -> tuple[str, list[ToolCallPart]]:
        """Text outside of calls that is certain to be such, and what the piece adds to calls."""
        self._buffer += text
        outside: list[str] = []
        parts: list[ToolCallPart] = []
        while self._step(outside, parts):
            pass
        return "".join(outside), parts

    def finish(self) -> str:
        """Text that was held back. What is left of a call that was cut short is dropped; its parts were told."""
        rest, self._buffer = self._buffer, ""
        if self._scanner is not None or (self.calls and not rest.strip()):
            return ""
        return rest

    def _step(self, outside: list[str], parts: list[ToolCallPart]) -> bool:
        """Makes some progress; False when more text is needed."""
        if self._scanner is not None:
            return self._arguments(parts)
        start = self._buffer.find(_HEAD)
        if start < 0:
            safe = len(self._buffer) - _held(self._buffer)
            if not self.calls:
                outside.append(self._buffer[:safe])
                self._buffer = self._buffer[safe:]
            return False
        name, separator, rest = self._buffer[start + len(_HEAD) :].partition(_ARGUMENTS)
        if not separator:
            return False
        if not self.calls:
            outside.append(self._buffer[:start].rstrip())
        parts.append(ToolCallPart(self.calls, name=name))
        self._buffer = rest
        self._scanner = _ObjectScanner()
        return True

    def _arguments(self, parts: list[ToolCallPart]) -> bool:
        assert self._scanner is not None
        length = self._scanner.scan(self._buffer)
        if length:
            parts.append(ToolCallPart(self.calls, arguments=self._buffer[:length]))
            self._buffer = self._buffer[length:]
        if not self._scanner.complete or len(self._buffer) < len(_TAIL):
            return False
        self._buffer = self._buffer.removeprefix(_TAIL)
        self._scanner = None
        self.calls += 1
        return True


class _ObjectScanner:
    """Finds the end of a JSON object that is known to be well formed."""

    def __init__(self) -> None:
        self.complete = False
        self._depth = 0
        self._in_string = False
        self._escaped = False

    def scan(self, text: str) -> int:
        """How many characters of ``text`` belong to the object."""
        if self.complete:
            return 0
        for position, character in enumerate(text):
            if self._escaped:
                self._escaped = False
            elif self._in_string:
                self._escaped = character == "\\"
                self._in_string = character != '"'
            elif character == '"':
                self._in_string = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
                if self._depth == 0:
                    self.complete = True
                    return position + 1
        return len(text)


def _held(text: str) -> int:
    """Length of the end of ``text`` that may become white space before a call, and its beginning."""
    longest = min(len(text), len(_HEAD) - 1)
    partial = next((n for n in range(longest, 0, -1) if text.endswith(_HEAD[:n])), 0)
    before = text[: len(text) - partial]
    return partial + len(before) - len(before.rstrip())

"""Tools: describes them to a model, and reads its calls from its answer.

Calls have the format of Hermes and Qwen models, one after the other at the end of an answer::

    <tool_call>
    {"name": "weather", "arguments": {"city": "Paris"}}
    </tool_call>

A grammar (``tools_grammar`` beside this module) enforces this format, so that reading a call cannot fail. Text and JSON
only; no tokens, no wire.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from overfill.api.stop import StopStrings
from overfill.errors import InvalidRequest
from overfill.request.params import Grammar
from overfill.v1.inference_pb2 import ToolCallDelta

BEGIN, END = "<tool_call>", "</tool_call>"
MAX_TOOLS = 128

HEAD = f'{BEGIN}\n{{"name": "'
ARGUMENTS = '", "arguments": '
TAIL = f"}}\n{END}"
TEXT_PARAMETERS = {
    "type": "object",
    "properties": {"input": {"type": "string"}},
    "required": ["input"],
    "additionalProperties": False,
}
"""Parameters of a tool that takes text."""

_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")

Mode = Literal["auto", "none", "required"]


@dataclass(frozen=True, slots=True)
class ToolDefinition:
    """A function that the model may call.

    Args:
        parameters: JSON schema of its arguments object.
        strict: Whether a schema that a grammar cannot enforce in full is an error.
        input: Grammar of the text that the tool takes; its parameters are then TEXT_PARAMETERS.
    """

    name: str
    description: str = ""
    parameters: Mapping[str, Any] = field(default_factory=lambda: {"type": "object", "properties": {}})
    strict: bool = False
    input: Grammar | None = None


def check_count(count: int) -> None:
    """Raise InvalidRequest if ``count`` tools are too many."""
    if count > MAX_TOOLS:
        raise InvalidRequest("chat.tools", f"has {count} tools; at most {MAX_TOOLS} are allowed")


def check_tools(tools: Sequence[ToolDefinition]) -> None:
    """Raise InvalidRequest if a name is invalid or used twice, or parameters do not describe an object."""
    check_count(len(tools))
    seen: set[str] = set()
    for index, tool in enumerate(tools):
        place = f"chat.tools[{index}]"
        if not _NAME.fullmatch(tool.name):
            raise InvalidRequest(f"{place}.name", f"is {tool.name[:80]!r}; give 1 to 64 letters, digits, _ or -")
        if tool.name in seen:
            raise InvalidRequest(
                f"{place}.name", f"is {tool.name!r}, which is another tool's name too; give each tool its own name"
            )
        kind = tool.parameters.get("type", "object")
        if kind != "object" and not (isinstance(kind, list) and "object" in kind):
            raise InvalidRequest(f"{place}.parameters", f'has "type" {str(kind)[:80]!r}; it must be "object"')
        if tool.input is not None and tool.parameters != TEXT_PARAMETERS:
            raise InvalidRequest(
                f"{place}.parameters", f"of a tool with an input must be {json.dumps(TEXT_PARAMETERS)}"
            )
        seen.add(tool.name)


def describe_tools(tools: Sequence[ToolDefinition]) -> str:
    """Text that describes ``tools``, for the system message of models whose chat template supports no tools."""
    lines = "\n".join(json.dumps(as_openai(tool), ensure_ascii=False) for tool in tools)
    return (
        "You may call functions. These are available, one JSON object per line:\n"
        f"<tools>\n{lines}\n</tools>\n"
        "To call a function, answer with nothing but a JSON object with its name and arguments in tags:\n"
        f'{BEGIN}\n{{"name": "function-name", "arguments": {{"argument-name": "value"}}}}\n{END}'
    )


def as_openai(tool: ToolDefinition) -> dict[str, Any]:
    """``tool`` in OpenAI's format, which chat templates expect."""
    function = {"name": tool.name, "description": tool.description, "parameters": dict(tool.parameters)}
    return {"type": "function", "function": function}


def write_calls(calls: Sequence[tuple[str, str]]) -> str:
    """Text of ``calls``, pairs of name and arguments as JSON text, in the model's format."""
    return "\n".join(f"{HEAD}{name}{ARGUMENTS}{arguments}{TAIL}" for name, arguments in calls)


class ToolCallReader:
    """Separates tool calls from other text in an answer that arrives in pieces, and ends that text at stop strings.

    It drops white space around calls. Text that only begins like a call counts as text. Stop strings count in the text
    before the first call; nothing but white space and calls follows it. A stop string that may be the beginning of a
    call is found once more text shows that it is not.

    Attributes:
        calls: Number of complete calls.
        stop: Stop string that ended the answer, or None. Callers push nothing after it.
    """

    def __init__(self, stops: StopStrings) -> None:
        self.calls = 0
        self.stop: str | None = None
        self._stops = stops
        self._buffer = ""
        self._space = ""  # white space at the end of the text so far
        self._scanner: _ObjectScanner | None = None

    @property
    def has_call(self) -> bool:
        """True once the answer has a call, complete or not."""
        return self.calls > 0 or self._scanner is not None

    def push(self, text: str, *, may_end: bool = True) -> tuple[str, list[ToolCallDelta]]:
        """Add a piece. Returns text that is certainly outside of calls, and new parts of calls, without ids.

        Args:
            may_end: As for ``StopStrings.push``.
        """
        self._buffer += text
        outside: list[str] = []
        parts: list[ToolCallDelta] = []
        while self._step(outside, parts, may_end):
            pass
        return "".join(outside), parts

    def finish(self, *, may_end: bool = True) -> str:
        """The text that was held back, at the end of the answer. Drops the rest of an incomplete call."""
        rest, self._buffer = self._buffer, ""
        if self._scanner is not None or rest.startswith(HEAD):
            return ""
        if self.calls:
            return rest if rest.strip() else ""
        text = self._text(rest, may_end)
        return text if self.stop is not None else text + self._space + self._stops.finish()

    def _step(self, outside: list[str], parts: list[ToolCallDelta], may_end: bool) -> bool:
        """Consume a part of the buffer; False if that needs more text."""
        if self._scanner is not None:
            return self._arguments(parts)
        start = self._buffer.find(HEAD)
        if not self.calls:
            end = len(self._buffer) - _partial_head(self._buffer) if start < 0 else start
            outside.append(self._text(self._buffer[:end], may_end))
            self._buffer = self._buffer[end:]
        elif start > 0:
            self._buffer = self._buffer[start:]
        if start < 0 or self.stop is not None:
            return False
        outside.append((self._space + self._stops.finish()).rstrip())
        self._space = ""
        name, separator, rest = self._buffer[len(HEAD) :].partition(ARGUMENTS)
        if not separator:
            return False
        parts.append(ToolCallDelta(index=self.calls, name=name))
        self._buffer = rest
        self._scanner = _ObjectScanner()
        return True

    def _text(self, text: str, may_end: bool) -> str:
        """What may be shown of the text after more ``text``: white space only if no call can follow it."""
        text, self.stop = self._stops.push(text, may_end=may_end)
        text = self._space + text
        shown = text.rstrip() if self.stop is None else text
        self._space = text[len(shown) :]
        return shown

    def _arguments(self, parts: list[ToolCallDelta]) -> bool:
        assert self._scanner is not None
        length = self._scanner.scan(self._buffer)
        if length:
            parts.append(ToolCallDelta(index=self.calls, arguments=self._buffer[:length]))
            self._buffer = self._buffer[length:]
        if not self._scanner.complete or len(self._buffer) < len(TAIL):
            return False
        self._buffer = self._buffer.removeprefix(TAIL)
        self._scanner = None
        self.calls += 1
        return True


class _ObjectScanner:
    """Finds the end of a well-formed JSON object in a text that arrives in pieces."""

    def __init__(self) -> None:
        self.complete = False
        self._depth = 0
        self._in_string = False
        self._escaped = False

    def scan(self, text: str) -> int:
        """Number of characters at the start of ``text`` that belong to the object."""
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


def _partial_head(text: str) -> int:
    """Length of the end of ``text`` that may become the head of a call."""
    longest = min(len(text), len(HEAD) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(HEAD[:n])), 0)

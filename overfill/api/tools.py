"""Tools: describes them to a model, makes the grammar of its calls, and reads the calls from its answer.

Calls have the format of Hermes and Qwen models, one after the other at the end of an answer::

    <tool_call>
    {"name": "weather", "arguments": {"city": "Paris"}}
    </tool_call>

A grammar enforces this format, so that reading a call cannot fail. Text and JSON only; no tokens, no wire.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from overfill.api.stop import StopStrings
from overfill.errors import InvalidRequest
from overfill.request.grammar import check_grammar, compact
from overfill.request.params import Grammar
from overfill.v1.inference_pb2 import ToolCallDelta

BEGIN, END = "<tool_call>", "</tool_call>"
MAX_TOOLS = 128

_HEAD = f'{BEGIN}\n{{"name": "'
_ARGUMENTS = '", "arguments": '
_TAIL = f"}}\n{END}"
_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")

# Keywords of JSON Schema whose values are objects with a schema for each name, and those whose values are not schemas.
_SCHEMAS_BY_NAME = frozenset({"properties", "patternProperties", "$defs", "definitions", "dependentSchemas"})
_VALUES = frozenset({"enum", "const", "default", "example", "examples"})

Mode = Literal["auto", "none", "required"]


@dataclass(frozen=True, slots=True)
class ToolDefinition:
    """A function that the model may call.

    Args:
        parameters: JSON schema of its arguments object.
        strict: Whether a schema that a grammar cannot enforce in full is an error.
    """

    name: str
    description: str = ""
    parameters: Mapping[str, Any] = field(default_factory=lambda: {"type": "object", "properties": {}})
    strict: bool = False


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
    return "\n".join(f"{_HEAD}{name}{_ARGUMENTS}{arguments}{_TAIL}" for name, arguments in calls)


def tools_grammar(
    tools: Sequence[ToolDefinition], mode: Mode, *, single: bool, answer: Mapping[str, Any] | None = None
) -> str:
    """A Lark grammar of answers that call ``tools``.

    Args:
        mode: "auto" allows text, then calls; "required" allows calls only.
        single: Whether an answer may have at most one call.
        answer: JSON schema of an answer without calls. In mode "auto", the answer is either JSON of this schema or
            calls without text before them: a model that begins with other text could not end its answer without a call.
    """
    functions = [f"{json.dumps(tool.name + _ARGUMENTS)} %json {json.dumps(_arguments(tool))}" for tool in tools]
    more = "" if single else f' ("\\n" {json.dumps(BEGIN)} body)*'
    start = f"{json.dumps(BEGIN)} body{more}"
    if mode == "auto":
        start = f"TEXT | first{more}" if answer is None else f"answer | {start}"
    lines = [
        "%llguidance {}",
        f"start: {start}",
        f"body: {json.dumps(_HEAD.removeprefix(BEGIN))} function {json.dumps(_TAIL)}",
        "function: " + " | ".join(f"function_{i}" for i in range(len(functions))),
        *(f"function_{i}: {function}" for i, function in enumerate(functions)),
    ]
    if mode == "auto" and answer is not None:
        lines.append(f"answer: %json {json.dumps(compact(dict(answer)))}")
    elif mode == "auto":
        lines += [
            "first: trigger body",
            f"trigger[lazy]: TEXT {json.dumps(BEGIN)}",
            r"TEXT: /(.|\n)*/",
        ]
    return "\n".join(lines) + "\n"


def enforceable(tool: ToolDefinition) -> ToolDefinition:
    """``tool`` with as much of its schema as a grammar can enforce.

    Tries, in this order: the whole schema; the schema without the patterns that no grammar can enforce; the schema
    without any pattern. If none works, the arguments are any object.

    Raises:
        InvalidRequest: ``tool`` is strict, and a grammar cannot enforce all of its schema.
    """
    choices: Sequence[Callable[[str], bool]] = (lambda _: False, _unenforceable, lambda _: True)
    for unwanted in choices:
        candidate = replace(tool, parameters=_without_patterns(tool.parameters, unwanted))
        try:
            check_grammar(Grammar.json_schema(_arguments(candidate)))
        except InvalidRequest:
            if tool.strict:
                raise
        else:
            return candidate
    return replace(tool, parameters={"type": "object"})


def _unenforceable(pattern: str) -> bool:
    try:
        check_grammar(Grammar.json_schema({"type": "string", "pattern": pattern}))
    except InvalidRequest:
        return True
    return False


def _without_patterns(schema: Mapping[str, Any], unwanted: Callable[[str], bool]) -> dict[str, Any]:
    """A copy of ``schema`` without its ``unwanted`` patterns."""
    copy: dict[str, Any] = json.loads(json.dumps(schema))
    parts: list[Any] = [copy]
    while parts:  # a recursive function would fail at deep schemas
        part = parts.pop()
        if isinstance(part, list):
            parts += part
        elif isinstance(part, dict):
            if isinstance(pattern := part.get("pattern"), str) and unwanted(pattern):
                del part["pattern"]
            for keyword, value in part.items():
                if keyword in _SCHEMAS_BY_NAME and isinstance(value, dict):
                    parts += value.values()
                elif keyword not in _VALUES:
                    parts.append(value)
    return copy


def _arguments(tool: ToolDefinition) -> dict[str, Any]:
    """The schema of the arguments, for llguidance."""
    # Require an object even if the schema does not, because `ToolCallReader` reads only objects.
    return compact({**(tool.parameters or {"properties": {}}), "type": "object"}, lenient=not tool.strict)


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
        if self._scanner is not None or rest.startswith(_HEAD):
            return ""
        if self.calls:
            return rest if rest.strip() else ""
        text = self._text(rest, may_end)
        return text if self.stop is not None else text + self._space + self._stops.finish()

    def _step(self, outside: list[str], parts: list[ToolCallDelta], may_end: bool) -> bool:
        """Consume a part of the buffer; False if that needs more text."""
        if self._scanner is not None:
            return self._arguments(parts)
        start = self._buffer.find(_HEAD)
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
        name, separator, rest = self._buffer[len(_HEAD) :].partition(_ARGUMENTS)
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
        if not self._scanner.complete or len(self._buffer) < len(_TAIL):
            return False
        self._buffer = self._buffer.removeprefix(_TAIL)
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
    longest = min(len(text), len(_HEAD) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(_HEAD[:n])), 0)

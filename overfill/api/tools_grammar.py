"""Makes the grammar of answers that may call tools, and tries it, in the process of a trial (``request.trials``)."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

from overfill.api.chat import read_tools, tool_choice
from overfill.api.families.choose import make_format
from overfill.api.families.hermes import Hermes
from overfill.api.families.tool_format import CallRules, ToolFormat
from overfill.api.text_grammar import text_before, text_in_json_string
from overfill.api.tools import TEXT_PARAMETER, Mode, ToolDefinition
from overfill.errors import InvalidRequest
from overfill.request.grammar import check_grammar
from overfill.request.json_schemas import compact
from overfill.request.params import Grammar
from overfill.request.trial import Bench
from overfill.v1 import inference_pb2

# Keywords of JSON Schema whose values are objects with a schema for each name, and those whose values are not schemas.
_SCHEMAS_BY_NAME = frozenset({"properties", "patternProperties", "$defs", "definitions", "dependentSchemas"})
_VALUES = frozenset({"enum", "const", "default", "example", "examples"})

_HERMES = Hermes()


def try_tools(payload: bytes, bench: Bench) -> bytes:
    """Makes the grammar of the tools in ``payload`` and tries it. Runs in a trial.

    Args:
        payload: name and ids of the ``ToolFormat`` as JSON, a zero byte, and a GenerateRequest.

    Returns:
        The grammar, in Lark; nothing if the tools must not be called.
    """
    format, _, message = payload.partition(b"\0")
    request = inference_pb2.GenerateRequest.FromString(message)
    answer = Grammar.from_proto(request.sampling.grammar) if request.sampling.HasField("grammar") else None
    if answer is not None:
        check_grammar(answer)
    made = chat_grammar(request.chat, answer, make_format(*json.loads(format)))
    if made is None:
        return b""
    try:
        bench.try_grammar(made)
    except InvalidRequest as error:
        raise InvalidRequest("chat.tools", error.reason) from error
    return made.text.encode()


def chat_grammar(
    chat: inference_pb2.Chat, answer: Grammar | None = None, format: ToolFormat = _HERMES
) -> Grammar | None:
    """A checked grammar of answers to ``chat``; None if they may not call tools. Raises InvalidRequest.

    Of tools that are not strict, it leaves out what llguidance cannot enforce.

    Args:
        answer: Grammar of answers that call no tools, of kind "json_object" or "json_schema"; None allows any text.
        format: How the model writes calls.
    """
    mode, name = tool_choice(chat)
    if mode == "none":
        return None
    schema = None
    if answer is not None:
        if answer.kind not in ("json_object", "json_schema"):
            raise InvalidRequest(
                f"sampling.grammar.{answer.kind}",
                "cannot be combined with tools; give a JSON schema, or set the choice of tools to none",
            )
        schema = json.loads(answer.text) if answer.text else {"type": "object"}
    tools = {index: tool for index, tool in enumerate(read_tools(chat)) if name in ("", tool.name)}

    def grammar() -> Grammar:
        text = tools_grammar(list(tools.values()), mode, single=chat.single_tool_call, answer=schema, format=format)
        check_grammar(made := Grammar("lark", text))
        return made

    with suppress(InvalidRequest):  # checks tools one by one only if it has to
        return grammar()
    for index, tool in tools.items():
        try:
            tools[index] = enforceable(tool, format)
        except InvalidRequest as error:
            if tool.input is not None:
                raise InvalidRequest(f"chat.tools[{index}].input", error.reason) from error
            reason = f"of the strict tool {tool.name!r} cannot be turned into a grammar: {error.reason}"
            raise InvalidRequest(f"chat.tools[{index}].parameters", reason) from error
    try:
        return grammar()
    except InvalidRequest as error:
        raise InvalidRequest("chat.tools", f"cannot be turned into a grammar: {error.reason}") from error


def tools_grammar(
    tools: Sequence[ToolDefinition],
    mode: Mode,
    *,
    single: bool,
    answer: Mapping[str, Any] | None = None,
    format: ToolFormat = _HERMES,
) -> str:
    """A Lark grammar of answers that call ``tools``.

    Args:
        mode: "auto" allows text, then calls; "required" allows calls only.
        single: Whether an answer may have at most one call.
        answer: JSON schema of an answer without calls. In mode "auto", the answer is either JSON of this schema or
            calls without text before them: a model that begins with other text could not end its answer without a call.
        format: How the model writes calls.
    """
    rules = format.rules(tools, _Expressions())
    rest = rules.closing if single else f"({rules.separator} call)* {rules.closing}"
    marker = rules.marker
    opening = "" if marker is None else marker.lark if rules.bare is None else f"{marker.lark}?"
    calls = f"{opening} {rules.lead} call {rest}"
    lines = ["%llguidance {}"]
    if mode == "required":
        lines.append(f"start: {calls}")
    elif answer is not None:
        lines += [f"start: answer | {calls}", f"answer: %json {json.dumps(compact(dict(answer)))}"]
    else:
        lines += [*_text_then_calls(rules, rest), r"TEXT: /(.|\n)*/"]
    return "\n".join(
        [
            *lines,
            f"call: {_literals(rules.before)} function {rules.after}",
            "function: " + " | ".join(f"function_{i}" for i in range(len(tools))),
            *(f"function_{i}: {_literals(head)} rest_{i}" for i, (head, _) in enumerate(rules.functions)),
            *(f"rest_{i}: {more}" for i, (_, more) in enumerate(rules.functions)),
            *rules.lines,
            "",
        ]
    )


def _literals(pieces: Iterable[str]) -> str:
    return " ".join(map(json.dumps, pieces))


def _text_then_calls(rules: CallRules, rest: str) -> list[str]:
    """Rules for an answer of any text, or of text before calls.

    A lazy rule ends the text as soon as calls begin, so that calls are never read as text.
    """
    marker = rules.marker
    choices, lines = ["TEXT"], []
    if marker is not None:
        text = f"TEXT {marker.lark}" if marker.is_token else "trigger"
        choices.append(f"{text} {rules.lead} call {rest}")
        if not marker.is_token:
            lines.append(f"trigger[lazy]: TEXT {marker.lark}")
    if rules.bare is not None:
        choices.append(f"bare {rules.after} {rest}")
        lines.append("bare: " + " | ".join(f"bare_{i} rest_{i}" for i in range(len(rules.functions))))
        lines.append(r"LINES: /(.|\n)*\n|\s*/")
        for i, (head, _) in enumerate(rules.functions):
            lines.append(f"bare_{i}[lazy]: LINES {json.dumps(''.join([rules.bare, *rules.before, *head]))}")
    return ["start: " + " | ".join(choices), *lines]


def enforceable(tool: ToolDefinition, format: ToolFormat) -> ToolDefinition:
    """``tool`` with as much of its schema as a grammar of calls in ``format`` can enforce.

    Tries, in this order: the whole schema; the schema without the patterns that no grammar can enforce; the schema
    without any pattern. If none works, the arguments are any object.

    Raises:
        InvalidRequest: ``tool`` is strict or takes text, and a grammar cannot enforce all of its schema or its grammar.
    """
    choices: Sequence[Callable[[str], bool]] = (lambda _: False, _unenforceable, lambda _: True)
    for unwanted in choices:
        candidate = replace(tool, parameters=_without_patterns(tool.parameters, unwanted))
        try:
            check_grammar(Grammar("lark", tools_grammar([candidate], "required", single=True, format=format)))
        except InvalidRequest:
            if tool.strict or tool.input is not None:
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


class _Expressions:
    """Lark expressions of what calls contain; see ``tool_format.Expressions``."""

    def arguments(self, tool: ToolDefinition) -> str:
        if tool.input is None:
            return f"%json {json.dumps(_arguments(tool))}"
        head, tail = json.dumps({TEXT_PARAMETER: "|"}).split("|")
        return f"{json.dumps(head)} {text_in_json_string(tool.input)} {json.dumps(tail)}"

    def input(self, text: Grammar, end: str) -> str:
        return f"{text_in_json_string(text)} {json.dumps(end)}" if end == '"' else text_before(end, text)


def _arguments(tool: ToolDefinition) -> dict[str, Any]:
    """The schema of the arguments, for llguidance."""
    # Require an object even if the schema does not, because calls have only objects.
    return compact({**(tool.parameters or {"properties": {}}), "type": "object"}, lenient=not tool.strict)

"""Calls as Llama 3.2 and 4 and ToolACE write them: a list in Python's syntax, at the beginning of a line.

::

    [weather(city="Paris", days=[1, 2]), now()]

Values are JSON; True, False and None stand for true, false and null too. A tool whose parameters cannot be keyword
arguments gets ``**`` and a JSON object.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence

from overfill.api.families.call_text import CallText
from overfill.api.families.parameters import KnownTools, named_parameters, named_values
from overfill.api.families.tool_format import NO_TOOLS, CallRules, Expressions, ToolFormat
from overfill.api.tools import TEXT_PARAMETER, ToolDefinition

_KEYWORD = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_WORDS = {"true": "True", "false": "False", "null": "None"}


class Pythonic(ToolFormat):
    """Pythonic: ``[name(parameter=value, …), …]``."""

    name = "pythonic"
    instruction = "To call functions, answer with nothing but a list of calls in Python's syntax, with literal values:"

    def rules(self, tools: Sequence[ToolDefinition], expressions: Expressions) -> CallRules:
        functions, lines = [], []
        types: dict[str, str] = {}  # a rule for all parameters of one type, by its body
        for i, tool in enumerate(tools):
            if tool.input is not None:
                functions.append(([f'{tool.name}({TEXT_PARAMETER}="'], expressions.input(tool.input, '"') + ' ")"'))
                continue
            parameters = named_parameters(tool, _KEYWORD)
            if parameters is None:
                functions.append(([f"{tool.name}("], f'"**" {expressions.arguments(tool)} ")"'))
                continue
            functions.append(([f"{tool.name}("], f'first_{i}_0 ")"'))
            for k, parameter in enumerate(parameters):
                skip = "" if parameter.required else f" | first_{i}_{k + 1}"
                lines.append(f"first_{i}_{k}: value_{i}_{k} next_{i}_{k + 1}{skip}")
                skip = "" if parameter.required else f" | next_{i}_{k + 1}"
                lines.append(f'next_{i}_{k}: ", " value_{i}_{k} next_{i}_{k + 1}{skip}')
                type = types.setdefault(parameter.json(), f"type_{len(types)}")
                lines.append(f"value_{i}_{k}: {json.dumps(parameter.name + '=')} {type}")
            lines += [f'first_{i}_{len(parameters)}: ""', f'next_{i}_{len(parameters)}: ""']
        lines += [f"{type}: {body}" for body, type in types.items()]
        return CallRules(functions, lead='"["', separator='", "', closing='"]"', bare="[", lines=lines)

    def openings(self, tools: Sequence[ToolDefinition]) -> Mapping[str, bool]:
        return {f"[{tool.name}(": True for tool in tools}

    def read(self, text: CallText, tools: KnownTools) -> Iterator[None]:
        yield from text.until("[")
        while True:
            text.begin((yield from text.until("(")))
            if (yield from text.first_of("**")):
                yield from text.value()
                yield from text.until(")")
            else:
                separator = "{"
                while not (yield from text.first_of(")")):
                    yield from text.first_of(", ")
                    text.arguments(f"{separator}{json.dumps((yield from text.until('=')))}: ")
                    separator = ", "
                    yield from text.value()
                text.arguments("{}" if separator == "{" else "}")
            text.end()
            if not (yield from text.first_of(", ")):
                return

    def write(self, calls: Sequence[tuple[str, str]], tools: KnownTools = NO_TOOLS) -> str:
        written = [
            f"{name}({_keywords(arguments, tools.parameters(name, _KEYWORD) is None)})" for name, arguments in calls
        ]
        return f"[{', '.join(written)}]"


def _keywords(arguments: str, whole: bool) -> str:
    """``arguments``, JSON text that ``max_tokens`` may have cut, in Python's syntax; as one object if ``whole``."""
    values = named_values(arguments, _KEYWORD)
    if whole or values is None:
        return f"**{arguments}"
    texts = {name: json.dumps(value, ensure_ascii=False) for name, value in values.items()}
    return ", ".join(f"{name}={_WORDS.get(text, text)}" for name, text in texts.items())

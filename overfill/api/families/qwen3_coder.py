"""Calls as Qwen3-Coder writes them: a tag for each parameter.

::

    <tool_call>
    <function=weather>
    <parameter=city>
    Paris
    </parameter>
    <parameter=days>
    [1, 2]
    </parameter>
    </function>
    </tool_call>

A parameter that takes text has the text itself as its value; the other ones have JSON. A tool whose parameters no tags
can name has one JSON object in place of the tags.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence

from overfill.api.families.call_text import CallText
from overfill.api.families.parameters import KnownTools, Parameter, Texts, named_parameters, named_values
from overfill.api.families.tool_format import NO_TOOLS, CallRules, Expressions, ToolFormat
from overfill.api.tools import TEXT_PARAMETER, ToolDefinition

_HEAD, _FUNCTION_END = "\n<function=", "</function>\n"
_PARAMETER, _PARAMETER_END = "<parameter=", "\n</parameter>\n"
_ANY_TEXT = Texts(None, nullable=False)
_NAME = re.compile(r"[^\s<>=]+")


class Qwen3Coder(ToolFormat):
    """Qwen3-Coder: ``<function=name>`` and ``<parameter=name>`` in tags of a call."""

    name = "qwen3_coder"
    special = ("<tool_call>", "</tool_call>")
    instruction = "To call a function, answer with nothing but its name and the values of its parameters in tags:"

    def rules(self, tools: Sequence[ToolDefinition], expressions: Expressions) -> CallRules:
        begin, end = self._markers
        functions, lines = [], [f"raw[lazy]: RAW {json.dumps(_PARAMETER_END)}", r"RAW: /(.|\n)*/"]
        types: dict[str, str] = {}  # a rule for all parameters of one type, by its body
        for i, tool in enumerate(tools):
            if tool.input is not None:
                tag = f"{_PARAMETER}{TEXT_PARAMETER}>\n"
                functions.append(([f"{tool.name}>\n", tag], expressions.input(tool.input, _PARAMETER_END)))
                continue
            parameters = named_parameters(tool, _NAME)
            if parameters is None:
                functions.append(([f"{tool.name}>\n"], f'{expressions.arguments(tool)} "\\n"'))
                continue
            functions.append(([f"{tool.name}>\n"], f"parameters_{i}"))
            values = ['""']
            for k, parameter in enumerate(parameters):
                tag = json.dumps(f"{_PARAMETER}{parameter.name}>\n")
                type = types.setdefault(_value(parameter), f"type_{len(types)}")
                lines.append(f"value_{i}_{k}: {tag} {type}")
                values.append(f"value_{i}_{k}" + ("" if parameter.required else "?"))
            lines.append(f"parameters_{i}: {' '.join(values)}")
        lines += [f"{type}: {body}" for body, type in types.items()]
        return CallRules(
            functions,
            marker=begin,
            before=[_HEAD],
            after=f"{json.dumps(_FUNCTION_END)} {end.lark}",
            separator=f'"\\n" {begin.lark}',
            lines=lines,
        )

    def openings(self, tools: Sequence[ToolDefinition]) -> Mapping[str, bool]:
        return {self._markers[0].shown + _HEAD: False}

    def read(self, text: CallText, tools: KnownTools) -> Iterator[None]:
        begin, end = self._markers
        while True:
            yield from text.until(begin.shown + _HEAD)
            name = yield from text.until(">\n")
            text.begin(name)
            named = {parameter.name: parameter for parameter in tools.parameters(name, _NAME) or ()}
            separator = "{"
            while not (yield from text.first_of(_FUNCTION_END)):
                if not (yield from text.first_of(_PARAMETER)):
                    yield from text.value()
                    yield from text.until(_FUNCTION_END)
                    separator = ""
                    break
                key = yield from text.until(">\n")
                text.arguments(f"{separator}{json.dumps(key, ensure_ascii=False)}: ")
                separator = ", "
                taken = _texts(named[key]) if key in named else _ANY_TEXT  # any text, if a client gave these tokens
                if taken is None:
                    yield from text.value()
                    yield from text.until(_PARAMETER_END)
                elif taken.nullable and (yield from text.first_of("null" + _PARAMETER_END)):
                    text.arguments("null")
                else:
                    text.arguments('"')
                    yield from text.text(_PARAMETER_END)
                    text.arguments('"')
            text.arguments({"{": "{}", ", ": "}", "": ""}[separator])
            yield from text.until(end.shown)
            text.end()

    def write(self, calls: Sequence[tuple[str, str]], tools: KnownTools = NO_TOOLS) -> str:
        begin, end = self._markers
        written = [(name, _parameters(arguments, tools.parameters(name, _NAME))) for name, arguments in calls]
        return "\n".join(f"{begin.text}{_HEAD}{name}>\n{body}{_FUNCTION_END}{end.text}" for name, body in written)


def _texts(parameter: Parameter) -> Texts | None:
    """The texts that are written without quotes; None if the values are JSON."""
    texts = parameter.texts()
    if texts is None or texts.allowed is None:
        return texts
    confusing = any(_PARAMETER_END.strip() in text or (text == "null" and texts.nullable) for text in texts.allowed)
    return None if confusing else texts


def _value(parameter: Parameter) -> str:
    end = json.dumps(_PARAMETER_END)
    texts = _texts(parameter)
    if texts is None:
        return f"{parameter.json()} {end}"
    if texts.allowed is None:
        return "raw"
    words = [*texts.allowed, *(["null"] if texts.nullable else [])]
    return f"({' | '.join(map(json.dumps, words))}) {end}"


def _parameters(arguments: str, parameters: Sequence[Parameter] | None) -> str:
    """``arguments``, JSON text that ``max_tokens`` may have cut, in tags; as one object if ``parameters`` is None."""
    values = named_values(arguments, _NAME)
    if parameters is None or values is None:
        return f"{arguments}\n"
    quoted = {parameter.name for parameter in parameters if parameter.name in values and _texts(parameter) is None}
    texts = {
        name: value if isinstance(value, str) and name not in quoted else json.dumps(value, ensure_ascii=False)
        for name, value in values.items()
    }
    if any((text + _PARAMETER_END).find(_PARAMETER_END) < len(text) for text in texts.values()):
        return f"{arguments}\n"
    return "".join(f"{_PARAMETER}{name}>\n{text}{_PARAMETER_END}" for name, text in texts.items())

"""Parameters of tools, for formats that write each one by its name: their types, and whether a call can name them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from overfill.api.tools import ToolDefinition
from overfill.request.json_schemas import close_objects, compact

_ANNOTATIONS = frozenset({"title", "description", "default", "examples", "deprecated", "$schema", "$id"})
_DEFINITIONS = ("$defs", "definitions")
_ROOT = {"type", "properties", "required", "additionalProperties", *_DEFINITIONS, *_ANNOTATIONS}
_TEXT = {"type", "enum", "const", "anyOf", "oneOf", "$ref", *_ANNOTATIONS}
_PYTHON_WORDS = {"True": "boolean", "False": "boolean", "None": "null"}
_MAX_REFERENCES, _MAX_CHOICES = 8, 64


@dataclass(frozen=True, slots=True)
class Texts:
    """Values of a parameter that takes text.

    Args:
        allowed: the texts; None allows any.
        nullable: whether it takes null too.
    """

    allowed: tuple[str, ...] | None
    nullable: bool


@dataclass(frozen=True, slots=True)
class Parameter:
    """A parameter of a tool.

    Args:
        schema: schema of its values.
        root: schema of the tool's arguments, to whose definitions ``schema`` may refer.
        strict: whether the tool is strict.
    """

    name: str
    required: bool
    schema: Mapping[str, Any]
    root: Mapping[str, Any]
    strict: bool

    def json(self) -> str:
        """Lark expression of its values as JSON, and of True, False and None where JSON has true, false and null.

        Parameters of one type have the same. Call it in a trial only, because it repeats the definitions.
        """
        whole = {keyword: value for keyword, value in self.schema.items() if keyword not in _ANNOTATIONS}
        if any(_references(self.schema)):
            whole = {keyword: self.root[keyword] for keyword in _DEFINITIONS if keyword in self.root} | whole
        types = _types(self.root, self.schema)
        words = [json.dumps(word) for word, type in _PYTHON_WORDS.items() if type in types]
        return f"({' | '.join([*words, f'%json {json.dumps(compact(whole, lenient=not self.strict))}'])})"

    def texts(self) -> Texts | None:
        """Its values, if they are texts and nothing else but null; else None.

        Other constraints on a text count only if the tool is strict: then the values are not just texts.
        """
        return _texts(self.root, self.schema, self.strict, set())


def named_parameters(tool: ToolDefinition, names: re.Pattern[str]) -> list[Parameter] | None:
    """The parameters of ``tool``; None if a call cannot list them one by one.

    That needs an object with fixed properties, whose schemas do not refer to each other.

    Args:
        names: names that the format can write.
    """
    root = close_objects({**(tool.parameters or {"properties": {}}), "type": "object"})
    properties, required = root.get("properties", {}), root.get("required", [])
    if root.get("additionalProperties") is not False or not root.keys() <= _ROOT or not isinstance(properties, dict):
        return None
    if not all(names.fullmatch(name) and isinstance(schema, dict) for name, schema in properties.items()):
        return None
    if not isinstance(required, list) or not all(isinstance(name, str) and name in properties for name in required):
        return None
    prefixes = tuple(f"#/{keyword}/" for keyword in _DEFINITIONS)
    if not all(isinstance(reference, str) and reference.startswith(prefixes) for reference in _references(root)):
        return None
    return [Parameter(name, name in required, schema, root, tool.strict) for name, schema in properties.items()]


def named_values(arguments: str, names: re.Pattern[str]) -> dict[str, Any] | None:
    """The values in ``arguments``, JSON text that ``max_tokens`` may have cut; None if a call cannot list them.

    Args:
        names: names that the format can write.
    """
    try:
        values = json.loads(arguments)
    except (ValueError, RecursionError):
        return None
    return values if isinstance(values, dict) and all(map(names.fullmatch, values)) else None


class KnownTools:
    """Tools by name, whose parameters are read once: a chat may have thousands of calls of a tool with a large schema.

    Args:
        tools: the tools of a request.
    """

    def __init__(self, tools: Sequence[ToolDefinition] = ()) -> None:
        self._tools = {tool.name: tool for tool in tools}
        self._read: dict[str, list[Parameter] | None] = {}

    def parameters(self, name: str, names: re.Pattern[str]) -> list[Parameter] | None:
        """The ``named_parameters`` of a tool; none for an unknown tool."""
        if name not in self._tools:
            return []
        if name not in self._read:
            self._read[name] = named_parameters(self._tools[name], names)
        return self._read[name]


def _references(schema: Any) -> Iterator[Any]:
    parts = [schema]
    while parts:
        part = parts.pop()
        if isinstance(part, list):
            parts += part
        elif isinstance(part, dict):
            parts += part.values()
            yield from (part[keyword] for keyword in ("$ref", "$dynamicRef", "$recursiveRef") if keyword in part)


def _resolved(root: Mapping[str, Any], schema: Any) -> dict[str, Any]:
    """``schema``, or what its reference refers to; empty if that is unknown."""
    for _ in range(_MAX_REFERENCES):
        if not isinstance(schema, dict):
            return {}
        if "$ref" not in schema:
            return schema
        _, keyword, *path = str(schema["$ref"]).split("/")
        definitions = root.get(keyword)
        schema = definitions.get(path[0]) if isinstance(definitions, dict) and len(path) == 1 else None
    return {}


def _types(root: Mapping[str, Any], schema: Any) -> set[str]:
    """Names of the types that ``schema`` or one of its choices allows."""
    types: set[str] = set()
    parts, seen = [schema], set()
    while parts:
        part = _resolved(root, parts.pop())
        if id(part) not in seen:
            seen.add(id(part))
            types |= _own_types(part)
            parts += _choices(part)
    return types


def _own_types(schema: Mapping[str, Any]) -> set[str]:
    types = schema.get("type")
    return {name for name in (types if isinstance(types, list) else [types]) if isinstance(name, str)}


def _choices(schema: Mapping[str, Any]) -> list[Any]:
    choices = schema.get("anyOf", schema.get("oneOf"))
    return choices if isinstance(choices, list) else []


def _texts(root: Mapping[str, Any], schema: Any, strict: bool, seen: set[int]) -> Texts | None:
    schema = _resolved(root, schema)
    if id(schema) in seen or len(seen) > _MAX_CHOICES or (strict and not schema.keys() <= _TEXT | set(_DEFINITIONS)):
        return None
    seen.add(id(schema))
    listed = schema.get("enum", [schema["const"]] if "const" in schema else None)
    if isinstance(listed, list):
        words = tuple(value for value in listed if isinstance(value, str))
        nulls = [value for value in listed if value is None]
        return Texts(words, bool(nulls)) if words and len(words) + len(nulls) == len(listed) else None
    if choices := _choices(schema):
        others = [choice for choice in choices if not (isinstance(choice, dict) and choice.get("type") == "null")]
        parts = [_texts(root, choice, strict, seen) for choice in others]
        known = [part for part in parts if part is not None]
        if not known or len(known) < len(parts):
            return None
        nullable = len(others) < len(choices) or any(part.nullable for part in known)
        if any(part.allowed is None for part in known):
            return Texts(None, nullable)
        return Texts(tuple(word for part in known for word in part.allowed or ()), nullable)
    types = _own_types(schema)
    return Texts(None, "null" in types) if "string" in types and types <= {"string", "null"} else None

"""Parameters of tools, for formats that write each one by its name: their types, and whether a call can name them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from overfill.api.tools import ToolDefinition
from overfill.request.json_schemas import close_objects, compact

_ANNOTATIONS = frozenset({"title", "description", "default", "examples", "deprecated", "$schema", "$id"})
_DEFINITIONS = ("$defs", "definitions")
_ROOT = {"type", "properties", "required", "additionalProperties", *_DEFINITIONS, *_ANNOTATIONS}
_TEXT = {"type", "enum", "const", "anyOf", "oneOf", "$ref", *_ANNOTATIONS}
_PYTHON_WORDS = {"True": "boolean", "False": "boolean", "None": "null"}
_MAX_REFERENCES = 8


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
        json: Lark expression of its values as JSON, and of True, False and None where JSON has true, false and null.
            Parameters of one type have the same.
        texts: its values, if they are texts and nothing else but null; else None.
    """

    name: str
    required: bool
    json: str
    texts: Texts | None


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
    if not isinstance(required, list) or not all(name in properties for name in required):
        return None
    prefixes = tuple(f"#/{keyword}/" for keyword in _DEFINITIONS)
    if not all(isinstance(reference, str) and reference.startswith(prefixes) for reference in _references(root)):
        return None
    shared = {keyword: root[keyword] for keyword in _DEFINITIONS if keyword in root}
    parameters = []
    for name, schema in properties.items():
        whole = {keyword: value for keyword, value in schema.items() if keyword not in _ANNOTATIONS}
        whole = {**shared, **whole} if any(_references(schema)) else whole
        types = set(_types(root, schema))
        words = [word for word, type in _PYTHON_WORDS.items() if type in types]
        wanted = [*map(json.dumps, words), f"%json {json.dumps(compact(whole, lenient=not tool.strict))}"]
        texts = _texts(root, schema, strict=tool.strict)
        parameters.append(Parameter(name, name in required, f"({' | '.join(wanted)})", texts))
    return parameters


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


def _types(root: Mapping[str, Any], schema: Any, depth: int = 0) -> Iterator[str]:
    schema = _resolved(root, schema)
    yield from _own_types(schema)
    for part in _choices(schema) if depth < _MAX_REFERENCES else ():
        yield from _types(root, part, depth + 1)


def _own_types(schema: Mapping[str, Any]) -> set[str]:
    types = schema.get("type")
    return {name for name in (types if isinstance(types, list) else [types]) if isinstance(name, str)}


def _choices(schema: Mapping[str, Any]) -> list[Any]:
    choices = schema.get("anyOf", schema.get("oneOf"))
    return choices if isinstance(choices, list) else []


def _texts(root: Mapping[str, Any], schema: Any, *, strict: bool, depth: int = 0) -> Texts | None:
    """The texts that ``schema`` allows; None if it allows other values, or if a strict tool constrains them further."""
    schema = _resolved(root, schema)
    if (strict and not schema.keys() <= _TEXT | set(_DEFINITIONS)) or depth > _MAX_REFERENCES:
        return None
    listed = schema.get("enum", [schema["const"]] if "const" in schema else None)
    if isinstance(listed, list):
        texts = tuple(value for value in listed if isinstance(value, str))
        nulls = [value for value in listed if value is None]
        return Texts(texts, bool(nulls)) if texts and len(texts) + len(nulls) == len(listed) else None
    if choices := _choices(schema):
        nullable, parts = False, []
        for choice in choices:
            if isinstance(choice, dict) and choice.get("type") == "null":
                nullable = True
            elif (part := _texts(root, choice, strict=strict, depth=depth + 1)) is not None:
                parts.append(part)
            else:
                return None
        allowed: list[str] | None = []
        for part in parts:
            nullable = nullable or part.nullable
            allowed = None if allowed is None or part.allowed is None else [*allowed, *part.allowed]
        return Texts(None if allowed is None else tuple(allowed), nullable) if parts else None
    types = _own_types(schema)
    return Texts(None, "null" in types) if "string" in types and types <= {"string", "null"} else None

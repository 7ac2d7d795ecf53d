"""JSON schemas as OpenAI's strict mode means them: an object has the properties that its schema names, and no others.

OpenAI refuses a strict schema that leaves ``additionalProperties`` out. Here it means false, so that a model cannot
invent keys. What such a schema leaves out of ``required`` stays optional.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_BY_NAME = ("properties", "patternProperties", "$defs", "definitions")
"""Keywords whose value maps names to schemas."""

_LISTS = ("items", "prefixItems", "anyOf", "oneOf")
_SINGLE = ("items", "additionalItems", "additionalProperties", "contains")
_OF_OBJECTS = ("properties", "patternProperties", "additionalProperties")
_ELSEWHERE = ("$ref", "anyOf", "oneOf")
"""Keywords with which other schemas describe the same object."""


class CannotClose(ValueError):
    """Several schemas describe one object, so that none of them can rule out what the others name.

    The message follows the name of a field, and an option's name follows the message.
    """


def closed(schema: Mapping[str, Any]) -> dict[str, Any]:
    """``schema`` with ``additionalProperties: false`` in every object schema, nested ones too, that does not have it.

    Raises:
        CannotClose: ``schema`` uses ``allOf``, or describes an object beside ``anyOf``, ``oneOf`` or ``$ref``.
    """
    if "allOf" in schema:
        raise CannotClose("has 'allOf', which cannot be combined with")
    result = dict(schema)
    described = [keyword for keyword in _OF_OBJECTS if keyword in schema]
    typed = "object" in _types(schema)
    elsewhere = [keyword for keyword in _ELSEWHERE if keyword in schema]
    for other in elsewhere:
        # `$ref` beside `type: object` is harmless: the schema that it names is closed.
        if beside := described or (["type"] if typed and other != "$ref" else []):
            raise CannotClose(f"has '{other}' beside '{beside[0]}', which cannot be combined with")
    for keyword, value in schema.items():
        if keyword in _BY_NAME and isinstance(value, Mapping):
            result[keyword] = {name: _inside(part) for name, part in value.items()}
        elif keyword in _LISTS and isinstance(value, list):
            result[keyword] = [_inside(part) for part in value]
        elif keyword in _SINGLE:
            result[keyword] = _inside(value)
    # `const` and `enum` list the values that are allowed, keys included.
    if (described or typed) and not elsewhere and "const" not in schema and "enum" not in schema:
        result.setdefault("additionalProperties", False)
    return result


def _inside(part: Any) -> Any:
    return closed(part) if isinstance(part, Mapping) else part


def _types(schema: Mapping[str, Any]) -> list[Any]:
    types = schema.get("type")
    return types if isinstance(types, list) else [types]

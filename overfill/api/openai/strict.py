"""Strict JSON schemas, as in OpenAI's strict mode: an object may have only the properties that its schema names.

OpenAI refuses a strict schema that omits ``additionalProperties``. This module sets it to false instead, so that the
model cannot invent keys. Properties that are not in ``required`` stay optional.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_NAMED_SCHEMAS = ("properties", "patternProperties", "$defs", "definitions")
"""Keywords whose value maps names to schemas."""

_SCHEMA_LISTS = ("items", "prefixItems", "anyOf", "oneOf")
_SINGLE_SCHEMAS = ("items", "additionalItems", "additionalProperties", "contains")
_OBJECT_KEYWORDS = ("properties", "patternProperties", "additionalProperties")
_ANNOTATIONS = frozenset({"title", "description", "default", "examples", "deprecated"})
_DEFINITIONS = frozenset({"$defs", "definitions"})
_REFERRING = ("$ref", "anyOf", "oneOf")
"""Keywords by which another schema describes the same object."""


class CannotForbid(ValueError):
    """Raised when ``additionalProperties: false`` cannot be added.

    Several schemas then describe one object, and each would forbid the others' properties. The message is the middle of
    a sentence; the caller adds the field's name in front and the option's name at the end.
    """


def forbid_additional_properties(schema: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of ``schema`` in which every object schema, nested ones included, has ``additionalProperties``.

    An object schema without that keyword gets ``additionalProperties: false``.

    Raises:
        CannotForbid: ``schema`` describes one object by several schemas: it uses ``allOf``, except for a single schema
            beside annotations, or it describes an object beside ``anyOf``, ``oneOf`` or ``$ref``.
    """
    schema = _without_all_of(schema)
    result = dict(schema)
    described = [keyword for keyword in _OBJECT_KEYWORDS if keyword in schema]
    typed = "object" in _types(schema)
    elsewhere = [keyword for keyword in _REFERRING if keyword in schema]
    for other in elsewhere:
        # `$ref` beside `type: object` is harmless: the referenced schema itself forbids additional properties.
        if beside := described or (["type"] if typed and other != "$ref" else []):
            raise CannotForbid(f"has '{other}' beside '{beside[0]}', which cannot be combined with")
    for keyword, value in schema.items():
        if keyword in _NAMED_SCHEMAS and isinstance(value, Mapping):
            result[keyword] = {name: _inside(part) for name, part in value.items()}
        elif keyword in _SCHEMA_LISTS and isinstance(value, list):
            result[keyword] = [_inside(part) for part in value]
        elif keyword in _SINGLE_SCHEMAS:
            result[keyword] = _inside(value)
    # `const` and `enum` list whole values, so they already fix the properties.
    if (described or typed) and not elsewhere and "const" not in schema and "enum" not in schema:
        result.setdefault("additionalProperties", False)
    return result


def _without_all_of(schema: Mapping[str, Any]) -> Mapping[str, Any]:
    """``schema`` with the single schema of its ``allOf`` put beside its annotations, which win over that schema's."""
    if "allOf" not in schema:
        return schema
    beside = {keyword: value for keyword, value in schema.items() if keyword != "allOf"}
    match schema["allOf"]:
        case [Mapping() as only] if beside.keys() <= _ANNOTATIONS | (_DEFINITIONS - only.keys()):
            return _without_all_of({**only, **beside})
    raise CannotForbid("has 'allOf', which cannot be combined with")


def _inside(part: Any) -> Any:
    return forbid_additional_properties(part) if isinstance(part, Mapping) else part


def _types(schema: Mapping[str, Any]) -> list[Any]:
    types = schema.get("type")
    return types if isinstance(types, list) else [types]

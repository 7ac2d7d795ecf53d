"""JSON schemas as OpenAI's strict mode means them: an object has the properties that its schema names, and no others.

OpenAI refuses a strict schema that leaves ``additionalProperties`` out. Here it means false, so that a model cannot
invent keys. What such a schema leaves out of ``required`` stays optional.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_BY_NAME = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
"""Keywords whose value maps names to schemas."""

_LISTS = ("items", "prefixItems", "anyOf", "oneOf", "allOf")
_SINGLE = ("items", "additionalItems", "additionalProperties", "contains")
_SAME_INSTANCE = ("anyOf", "oneOf", "allOf", "dependentSchemas")
"""Keywords whose schemas are for the very object that the schema around them describes."""


def closed(schema: Mapping[str, Any]) -> dict[str, Any]:
    """``schema`` with ``additionalProperties: false`` in every object schema, nested ones too, that does not have it.

    The parts of an ``allOf``, and alternatives beside ``properties``, describe one object together. None of them is
    closed alone, since it would rule out the properties of the others.
    """
    return _closed(schema, shared=False)


def _closed(schema: Mapping[str, Any], shared: bool) -> dict[str, Any]:
    result = dict(schema)
    is_object = "properties" in schema or "object" in _types(schema)
    for keyword, value in schema.items():
        part_shared = keyword in _SAME_INSTANCE and (shared or is_object or keyword not in ("anyOf", "oneOf"))
        if keyword in _BY_NAME and isinstance(value, Mapping):
            result[keyword] = {name: _inside(part, part_shared) for name, part in value.items()}
        elif keyword in _LISTS and isinstance(value, list):
            result[keyword] = [_inside(part, part_shared) for part in value]
        elif keyword in _SINGLE:
            result[keyword] = _inside(value, False)
    if is_object and not shared:
        result.setdefault("additionalProperties", False)
    return result


def _inside(part: Any, shared: bool) -> Any:
    return _closed(part, shared) if isinstance(part, Mapping) else part


def _types(schema: Mapping[str, Any]) -> list[Any]:
    types = schema.get("type")
    return types if isinstance(types, list) else [types]

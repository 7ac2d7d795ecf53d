"""Closes the objects of JSON schemas: such an object has only the properties that its schema names.

By the letter of JSON Schema, an object may have any other property. A model that follows that letter invents keys until
``max_tokens`` ends its answer, and clients then refuse the answer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from urllib.parse import unquote

_NAMED_SCHEMAS = ("properties", "patternProperties", "$defs", "definitions")
"""Keywords whose value maps names to schemas."""

_SCHEMA_LISTS = ("items", "prefixItems", "anyOf", "oneOf", "allOf")
_SINGLE_SCHEMAS = ("items", "additionalItems", "additionalProperties", "contains")

_REFERRING = ("$ref", "anyOf", "oneOf", "allOf")
_REFERENCES = ("$ref", "$dynamicRef", "$recursiveRef")
_APPLIED = (*_REFERENCES, *_REFERRING, "if", "then", "else", "not", "dependentSchemas")
"""Keywords by which another schema describes the same value."""

_OBJECT_KEYWORDS = ("properties", "patternProperties", "additionalProperties")
_OWN = (*_OBJECT_KEYWORDS, "unevaluatedProperties", "required", "minProperties", "maxProperties")
"""Keywords by which a schema itself describes an object."""

_ANNOTATIONS = frozenset({"title", "description", "default", "examples", "deprecated"})
_DEFINITIONS = frozenset({"$defs", "definitions"})

# Fixes the white space of JSON. Otherwise a model may write white space without end, and layouts differ by answer.
_COMPACT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}

# Ignores keywords and formats that llguidance does not support, and reads oneOf as anyOf.
_LENIENT = {"lenient": True, "coerce_one_of": True}

_Schema = dict[str, Any]


class CannotForbid(ValueError):
    """Raised when ``additionalProperties: false`` cannot be added.

    Several schemas then describe one object, and each would forbid the others' properties. The message is the middle of
    a sentence; the caller adds the field's name in front and ``strict`` at the end.
    """


def close_objects(schema: Mapping[str, Any], *, allow_more: bool = False) -> _Schema:
    """A copy of ``schema`` in which objects may have only the properties that it names, as far as that is plain.

    Every object schema with ``properties`` or ``patternProperties`` gets ``additionalProperties: false``, as from
    vLLM's and xgrammar's strict mode. These stay as they are: a schema that says ``additionalProperties`` or
    ``unevaluatedProperties`` itself; one that requires other properties, or more than it names; ``const`` and ``enum``,
    which list whole values; and schemas that describe one object together, by ``allOf`` for example, because each would
    forbid the others' properties.

    Args:
        allow_more: Whether to write ``additionalProperties: true`` instead, which keeps these objects open.
    """
    copy, schemas = _copied(schema)
    try:
        together = _together(copy, schemas)
    except LookupError:  # a reference to an anchor or a dynamic one: it might mean any of these schemas
        return copy
    for part in schemas:
        if id(part) not in together and _can_close(part):
            part["additionalProperties"] = allow_more
    return copy


def compact(schema: Mapping[str, Any], *, lenient: bool = False) -> _Schema:
    """``schema`` with closed objects, and with an option that fixes the white space to that of ``json.dumps``.

    Args:
        lenient: Whether the grammar ignores those constraints of the schema that llguidance does not support.
    """
    return {"x-guidance": _COMPACT | (_LENIENT if lenient else {}), **close_objects(schema)}


def forbid_additional_properties(schema: Mapping[str, Any]) -> _Schema:
    """A copy of ``schema`` in which every object schema, nested ones included, has ``additionalProperties``.

    This is OpenAI's strict mode, but OpenAI refuses a schema that omits ``additionalProperties``. An object schema
    without that keyword gets ``additionalProperties: false``. Properties that are not in ``required`` stay optional.

    Raises:
        CannotForbid: ``schema`` describes one object by several schemas: it uses ``allOf``, except for a single schema
            beside annotations, or it describes an object beside ``anyOf``, ``oneOf`` or ``$ref``.
    """
    copy, schemas = _copied(schema)
    for part in schemas:
        described = [keyword for keyword in _OBJECT_KEYWORDS if keyword in part]
        typed = "object" in _types(part)
        elsewhere = [keyword for keyword in _REFERRING if keyword in part]
        for other in elsewhere:
            # `$ref` beside `type: object` is harmless: the referenced schema itself forbids additional properties.
            beside = described or (["type"] if typed and other != "$ref" else [])
            if other == "allOf" and not _is_alone(part):
                raise CannotForbid("has 'allOf', which cannot be combined with")
            if beside:
                raise CannotForbid(f"has '{other}' beside '{beside[0]}', which cannot be combined with")
        # `const` and `enum` list whole values, so they already fix the properties.
        if (described or typed) and not elsewhere and "const" not in part and "enum" not in part:
            part.setdefault("additionalProperties", False)
    return copy


def _is_alone(schema: _Schema) -> bool:
    """Whether ``allOf`` of ``schema`` holds a single schema, with nothing beside it but annotations and definitions."""
    match schema["allOf"]:
        case [dict()]:
            return schema.keys() <= _ANNOTATIONS | _DEFINITIONS | {"allOf"}
    return False


def _can_close(schema: _Schema) -> bool:
    if not schema.keys().isdisjoint(("additionalProperties", "unevaluatedProperties", "const", "enum")):
        return False
    named, patterns = schema.get("properties"), schema.get("patternProperties")
    if isinstance(patterns, dict):
        return True
    if not isinstance(named, dict):
        return False
    required, least = schema.get("required"), schema.get("minProperties")
    return all(name in named for name in _texts(required)) and not (isinstance(least, int) and least > len(named))


def _copied(schema: Mapping[str, Any]) -> tuple[_Schema, list[_Schema]]:
    """A copy of ``schema`` that shares no schema with it, and all schemas in the copy. Deep schemas need no stack."""
    root: _Schema = {"": schema}
    schemas: list[_Schema] = []
    places: list[tuple[Any, Any]] = [(root, "")]  # a container, and the key or index of a schema in it
    while places:
        container, key = places.pop()
        if not isinstance(container[key], Mapping):
            continue
        part = container[key] = dict(container[key])
        schemas.append(part)
        for keyword in part.keys() & {*_NAMED_SCHEMAS, *_SCHEMA_LISTS, *_SINGLE_SCHEMAS}:
            value = part[keyword]
            if keyword in _NAMED_SCHEMAS and isinstance(value, Mapping):
                part[keyword] = dict(value)
                places += [(part[keyword], name) for name in value]
            elif keyword in _SCHEMA_LISTS and isinstance(value, list):
                part[keyword] = list(value)
                places += [(part[keyword], index) for index in range(len(value))]
            elif keyword in _SINGLE_SCHEMAS:
                places.append((part, keyword))
    return root[""], schemas


def _together(root: _Schema, schemas: Sequence[_Schema]) -> set[int]:
    """The ids of those schemas that describe a value together with others. Raises LookupError."""
    waiting = [schema for schema in schemas if _is_one_of_several(schema)]
    together: set[int] = set()
    while waiting:
        schema = waiting.pop()
        if id(schema) not in together:
            together.add(id(schema))
            waiting += _applied(root, schema)
    return together


def _is_one_of_several(schema: _Schema) -> bool:
    """Whether ``schema`` applies more than one schema to a value, itself included."""
    applied = schema.keys() & _APPLIED
    all_of = schema.get("allOf")
    several = len(applied) > 1 or (isinstance(all_of, list) and len(all_of) > 1)
    return several or (bool(applied) and not schema.keys().isdisjoint(_OWN))


def _applied(root: _Schema, schema: _Schema) -> Iterator[_Schema]:
    """The schemas that describe the same value as ``schema``. Raises LookupError."""
    for keyword in schema.keys() & _APPLIED:
        value = schema[keyword]
        if keyword in _REFERENCES:
            value = _target(root, value)
        elif keyword == "dependentSchemas" and isinstance(value, dict):
            value = list(value.values())
        yield from (part for part in (value if isinstance(value, list) else [value]) if isinstance(part, dict))


def _target(root: _Schema, reference: Any) -> Any:
    """The place in ``root`` to which ``reference`` refers, such as ``#/$defs/name``. Raises LookupError."""
    if not (isinstance(reference, str) and (reference == "#" or reference.startswith("#/"))):
        raise LookupError(reference)
    place: Any = root
    for step in unquote(reference).split("/")[1:]:
        step = step.replace("~1", "/").replace("~0", "~")
        if isinstance(place, list) and step.isdecimal():
            place = place[int(step)]
        elif isinstance(place, dict):
            place = place[step]
        else:
            raise LookupError(reference)
    return place


def _types(schema: _Schema) -> list[Any]:
    types = schema.get("type")
    return types if isinstance(types, list) else [types]


def _texts(value: Any) -> list[str]:
    return [text for text in value if isinstance(text, str)] if isinstance(value, list) else []

"""Says in words which values a setting allows, and its default, from the declaration of its field. No torch."""

from __future__ import annotations

import types
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import ByteSize, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

PLACEHOLDERS = {
    "routers": "HOST:PORT,...", "served_model_name": "NAME,...", "tiers": "NAME=PAIR:N;...",
    "canary_tiers": "NAME=PAIR:N;...", "canary_pair": "PAIR", "canary_revision": "NAME", "revision": "NAME",
    "brownout": "'TIER > TIER...'", "allowed_origins": "ORIGIN,...", "engine_args": "JSON", "shared_cores": "FILE",
    "share_port": "FOLDER", "adapters": "FOLDER", "device": "auto|cpu|cuda[:N]", "pair": "PAIR",
    "otlp_traces_endpoint": "URL", "probe_host": "HOST",
    "host": "HOST", "metrics_host": "HOST", "default_tier": "TIER", "tier": "TIER", "advertise": "HOST[:PORT]",
}  # fmt: skip
"""Field -> placeholder of its value in --help, for fields whose type does not say enough."""


def allowed(field: FieldInfo) -> str:
    """Returns what the field's value must be, such as "a whole number from 1 to 64"."""
    return ", or ".join(_words(kind, limits) for kind, limits in _kinds(field))


def placeholder(name: str, field: FieldInfo) -> str:
    """Returns a short form of what the field's value may be, for --help, such as ``N`` or ``on|off``."""
    return PLACEHOLDERS.get(name) or "|".join(_short(kind) for kind, _ in _kinds(field))


def default_text(field: FieldInfo) -> str:
    """Returns a field's default as users write it."""
    if isinstance(field.default, bool):
        return "on" if field.default else "off"
    if isinstance(field.default, ByteSize):
        return field.default.human_readable().replace(".0", "")
    return f"{field.default:g}" if isinstance(field.default, float) else str(field.default)


def fault(field: FieldInfo, value: object) -> str:
    """Returns what is wrong with a value, as "must be X, got Y"; empty if nothing is."""
    kind: Any = Annotated[(field.annotation, *field.metadata)] if field.metadata else field.annotation
    try:
        TypeAdapter(kind).validate_python(value)
    except ValidationError as error:
        return next(describe(field, item["type"], item["msg"], item["input"]) for item in error.errors())
    return ""


def describe(field: FieldInfo, kind: str, message: str, value: object) -> str:
    """Returns a fault that pydantic found in a field. Messages of our own checks stay; others are put in our words."""
    if kind == "value_error":
        return f"{message.removeprefix('Value error, ')}, got {value!r}"
    return f"must be {allowed(field)}, got {value!r}"


def _kinds(field: FieldInfo) -> list[tuple[Any, dict[str, float]]]:
    """Returns each type that the field's value may have, with its limits (ge, gt, le)."""
    found: list[tuple[Any, dict[str, float]]] = []

    def add(kind: Any, metadata: tuple[Any, ...]) -> None:
        if get_origin(kind) is Annotated:
            inner, *more = get_args(kind)
            add(inner, (*metadata, *more))
        elif get_origin(kind) in (Union, types.UnionType):
            for each in get_args(kind):
                add(each, metadata)
        elif kind is not type(None):
            flat = [part for item in metadata for part in (item.metadata if isinstance(item, FieldInfo) else [item])]
            found.append(
                (
                    kind,
                    {name: getattr(part, name) for part in flat for name in ("ge", "gt", "le") if hasattr(part, name)},
                )
            )

    add(field.annotation, tuple(field.metadata))
    return found


def _words(kind: Any, limits: dict[str, float]) -> str:
    if get_origin(kind) is Literal:
        *others, last = map(str, get_args(kind))
        return f"{', '.join(others)} or {last}" if others else last
    if kind is bool:
        return "on or off"
    if kind is ByteSize:
        return "a size such as 512MiB or 4GB"
    if kind not in (int, float):
        return "a path" if kind is Path else "text"
    number = "a whole number" if kind is int else "a number"
    if {"ge", "le"} <= limits.keys():
        return f"{number} from {limits['ge']:g} to {limits['le']:.15g}"
    if "gt" in limits:
        return f"{number} above {limits['gt']:g}"
    return f"{number} of at least {limits['ge']:g}" if "ge" in limits else number


def _short(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return "|".join(map(str, get_args(kind)))
    return {bool: "on|off", int: "N", float: "NUMBER", ByteSize: "SIZE", Path: "FILE"}.get(kind, "TEXT")

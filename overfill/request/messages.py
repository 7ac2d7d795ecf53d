"""Reads dataclasses from messages of the wire whose fields have the same names."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from google.protobuf.message import Message


def shared_fields(kind: Any, message: Message) -> dict[str, Any]:
    """Returns the fields of ``message`` that the dataclass ``kind`` has too, by name."""
    names = message.DESCRIPTOR.fields_by_name
    return {f.name: getattr(message, f.name) for f in fields(kind) if f.name in names}

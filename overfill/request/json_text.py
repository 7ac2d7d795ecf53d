"""Reads JSON that a client has put into a text field of its request. Knows nothing about what the JSON means."""

from __future__ import annotations

import json
import math
import re
from typing import Any, NoReturn

from overfill.errors import InvalidRequest

MAX_JSON_DEPTH = 200
"""Maximum nesting of objects and arrays, which is also that of an HTTP body.

Python's functions for JSON, and chat templates, recurse. How deep they may go depends on the stack of their caller.
"""

_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def read_json(field: str, text: str) -> Any:
    """Returns the value of ``text``. It can be written as JSON again, and as UTF-8.

    Raises:
        InvalidRequest: ``text`` is not JSON, is nested more than ``MAX_JSON_DEPTH`` levels deep, or has a string with a
            lone surrogate, which is not valid Unicode; ``field`` names it.
    """
    try:
        value = _DECODER.decode(text)
    except RecursionError:
        raise _too_deep(field) from None
    except ValueError as error:
        raise InvalidRequest(field, f"is not JSON: {error}") from error
    if text.count("{") + text.count("[") > MAX_JSON_DEPTH and _depth(value) > MAX_JSON_DEPTH:
        raise _too_deep(field)
    if _SURROGATE.search(text):  # a pair of them is a character
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            found = f"\\u{ord(error.object[error.start]):04x}"
            raise InvalidRequest(
                field, f"has the lone surrogate {found} in a string, which is not valid Unicode; leave it out"
            ) from None
    return value


def _too_deep(field: str) -> InvalidRequest:
    return InvalidRequest(field, f"is nested too deeply; at most {MAX_JSON_DEPTH} levels are allowed")


def _depth(value: Any) -> int:
    """Returns the number of objects and arrays around the innermost value."""
    level, depth = [value], 0
    while level := [part for part in level if isinstance(part, dict | list)]:
        level = [inside for part in level for inside in (part.values() if isinstance(part, dict) else part)]
        depth += 1
    return depth


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number of JSON")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:40]} is larger than any 64-bit floating point number")
    return value


_DECODER = json.JSONDecoder(parse_constant=_no_constant, parse_float=_finite)

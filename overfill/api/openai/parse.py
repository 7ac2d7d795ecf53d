"""Parses a request body into a class of ``schema``, with error messages in OpenAI's words."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import from_json

from overfill.api.chat import MAX_ITEMS
from overfill.api.openai.errors import ApiError
from overfill.api.openai.schema import CompletionRequest, Strict, refusals

R = TypeVar("R", bound=Strict)

_MAX_PROBLEMS = 1000
"""Limit on validation errors that are examined. More are only counted: describing them costs more than the request."""

_BAD_JSON = "We could not parse the JSON body of your request"


def check_items(body: bytes, name: str) -> None:
    """Raises ApiError if the list ``name`` of ``body``, its items or its tools have too many elements with their parts.

    Parsing them takes a hundred times as long as this check, and holds the interpreter's lock for all that time.
    """
    try:
        value = from_json(body)
    except ValueError:
        return  # ``parse`` says what is wrong
    if not isinstance(value, dict):
        return
    for field in (name, "tools"):
        if (count := _count(value.get(field))) > MAX_ITEMS:
            raise ApiError(
                400,
                f"'{field}' has {count} items with their parts and tool calls; at most {MAX_ITEMS} are allowed",
                param=field,
                code="invalid_value",
            )


def _count(value: Any) -> int:
    """The number of elements of a list, and of the lists in its elements."""
    if not isinstance(value, list):
        return 0
    return len(value) + sum(_count(part) for item in value if isinstance(item, dict) for part in item.values())


def parse(kind: type[R], body: bytes) -> R:
    """Parses ``body`` as a request of class ``kind``. Raises ApiError that names the wrong field."""
    try:
        request = kind.model_validate_json(body)
    except ValidationError as error:
        raise _explain(error, body) from None
    except RecursionError:
        raise ApiError(400, f"{_BAD_JSON}: it is nested too deeply", code="invalid_json") from None
    _check_refused(request, "")
    items: Any = getattr(request, kind.ITEMS, None)
    for index, item in enumerate(items if isinstance(items, list) else ()):
        if isinstance(item, BaseModel):
            _check_refused(item, f"{kind.ITEMS}[{index}].")
    for name in ("response_format", "structured_outputs"):
        shape: BaseModel | None = getattr(request, name, None)
        if shape is not None:
            _check_refused(shape, f"{name}.")
    return request


def _check_refused(holder: BaseModel, place: str) -> None:
    marks = refusals(type(holder))
    if marks.keys().isdisjoint(holder.model_fields_set):
        return
    for name, refused in marks.items():
        value = getattr(holder, name)
        as_n = name == "best_of" and isinstance(holder, CompletionRequest) and value == holder.n
        if value is not None and value not in refused.neutral and not as_n:
            param = f"{place}{name}"
            message = f"'{param}' is not supported here: {refused.reason}"
            raise ApiError(400, message, param=param, code="unsupported_parameter")


def _explain(error: ValidationError, body: bytes) -> ApiError:
    if error.error_count() > _MAX_PROBLEMS:
        return ApiError(400, f"the request is wrong in {error.error_count()} places", code="invalid_value")
    problems = error.errors(include_url=False, include_context=False)
    if problems[0]["type"] == "json_invalid":
        reason = problems[0]["msg"].removeprefix("Invalid JSON: ")
        return ApiError(400, f"{_BAD_JSON}: {reason}", code="invalid_json")
    value = json.loads(body, strict=False)
    # Every branch of a union reports an error. Take the one that got furthest into the request.
    depths = [len(_path(problem["loc"], value)) for problem in problems]
    problem = problems[depths.index(max(depths))]
    path = _path(problem["loc"], value)
    param = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in path).removeprefix(".") or None
    if problem["type"] == "extra_forbidden":
        return ApiError(
            400, f"Unrecognized request argument supplied: {str(param)[:200]}", param=param, code="unknown_parameter"
        )
    if problem["type"] == "missing":
        name = str(problem["loc"][-1])
        param = f"{param}.{name}" if param else name
        return ApiError(400, f"Missing required parameter: '{param}'.", param=param, code="missing_required_parameter")
    same = [p["msg"] for p in problems if _path(p["loc"], value) == path]
    reasons = "; or ".join(dict.fromkeys(m[:1].lower() + m[1:] for m in same))
    where = f"'{param}'" if param else "the request"
    return ApiError(400, f"Invalid value for {where}: {reasons}"[:1000], param=param, code=_code(problem["type"]))


def _code(kind: str) -> str:
    return "invalid_type" if kind.endswith(("_type", "_parsing")) else "invalid_value"


def _path(loc: Sequence[int | str], value: Any) -> list[int | str]:
    """Returns the keys and indexes of ``loc``, pydantic's location of an error, that exist in ``value``.

    Pydantic puts names of types between them.
    """
    path: list[int | str] = []
    for step in loc:
        in_dict = isinstance(value, dict) and step in value
        in_list = isinstance(value, list) and isinstance(step, int) and step < len(value)
        if in_dict or in_list:
            value = value[step]
            path.append(step)
    return path

"""What the translations of all APIs share: values on the wire, and errors that name the client's field."""

from __future__ import annotations

import json
from typing import Any

from overfill.api.openai.errors import ApiError
from overfill.api.openai.schema import Generating
from overfill.errors import InvalidRequest
from overfill.request.json_schemas import CannotForbid, forbid_additional_properties
from overfill.request.params import Grammar, GrammarKind
from overfill.v1 import common_pb2, inference_pb2


def invalid(param: str, message: str) -> ApiError:
    """The error that the field ``param`` has a wrong value."""
    return ApiError(400, f"'{param}' {message}", param=param, code="invalid_value")


def json_text(field: str, value: Any) -> str:
    """``value``, from ``field``, as JSON text. Raises ApiError."""
    try:
        return json.dumps(value, allow_nan=False, ensure_ascii=False)
    except ValueError:
        raise invalid(field, "holds NaN or an infinite number, which JSON does not have") from None


def uint32(field: str, value: int) -> int:
    """``value``, from ``field``. Raises ApiError if it does not fit the wire's integer."""
    if not 0 < value < 1 << 32:
        raise invalid(field, f"must be in [1, 2^32), got {value}")
    return value


def grammar_of(field: str, kind: GrammarKind, text: str) -> Grammar:
    """The grammar that ``field`` holds. Raises ApiError."""
    try:
        return Grammar(kind, text)
    except InvalidRequest as error:
        raise invalid(field, error.reason) from None


def schema_grammar(field: str, schema: dict[str, Any], *, strict: bool = False) -> Grammar:
    """A grammar of JSON of the schema that ``field`` holds. Raises ApiError.

    Args:
        strict: whether its objects have only the keys that they name.
    """
    found = grammar_of(field, "json_schema", json_text(field, schema))
    return Grammar.json_schema(forbid_additional(field, json.loads(found.text))) if strict else found


def forbid_additional(field: str, schema: dict[str, Any]) -> dict[str, Any]:
    """``schema``, from ``field``, with objects that have only the keys that they name. Raises ApiError."""
    try:
        return forbid_additional_properties(schema)
    except CannotForbid as error:
        raise invalid(field, f"{error} 'strict'; name all properties in one object") from None


def function_tool(
    name: str, description: str | None, field: str, parameters: dict[str, Any] | None, *, strict: bool | None
) -> inference_pb2.Tool:
    """A tool whose ``parameters`` ``field`` holds. Raises ApiError."""
    if strict:
        parameters = forbid_additional(field, parameters or {"type": "object", "properties": {}})
    return inference_pb2.Tool(
        name=name,
        description=description or "",
        parameters=json_text(field, parameters) if parameters else "",
        strict=bool(strict),
    )


def router_request(
    request: Generating, request_id: str, sampling: common_pb2.SamplingParams
) -> inference_pb2.GenerateRequest:
    """A router request without its prompt."""
    generate = inference_pb2.GenerateRequest(
        model=request.model,
        sampling=sampling,
        stop=[request.stop] if isinstance(request.stop, str) else request.stop or (),
        request_id=request_id,
        priority=request.priority or 0,
        tier=request.tier,
        fallback=request.fallback,
    )
    if request.allow_brownout is not None:
        generate.allow_brownout = request.allow_brownout
    return generate


def sampling_params(request: Generating) -> common_pb2.SamplingParams:
    """The sampling parameters that all of OpenAI's APIs have. Raises ApiError."""
    params = common_pb2.SamplingParams(
        seed=None if request.seed is None else request.seed % (1 << 64),
        ignore_eos=bool(request.ignore_eos),
        repetition_penalty=request.repetition_penalty,
        presence_penalty=request.presence_penalty,
        frequency_penalty=request.frequency_penalty,
    )
    set_filters(params, request.temperature, request.top_p, request.top_k, request.min_p)
    return params


def set_filters(
    params: common_pb2.SamplingParams,
    temperature: float | None,
    top_p: float | None,
    top_k: int | None,
    min_p: float | None = None,
) -> None:
    """Sets the temperature and what keeps some tokens only. Raises ApiError."""
    params.temperature = 1.0 if temperature is None else temperature
    if top_p == 0:  # keeps only the most likely token
        params.temperature = 0.0
    if params.temperature > 0:  # greedy needs no filters
        if top_p is not None:
            params.top_p = top_p
        if min_p is not None:
            params.min_p = min_p
        if top_k is not None and top_k not in (0, -1):  # for vLLM, 0 and -1 mean all tokens
            params.top_k = uint32("top_k", top_k)

"""Errors in the format of OpenAI's API: a status, and a body that its clients turn into exceptions."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from overfill.errors import (
    DeadlineExceeded,
    Incompatible,
    InvalidRequest,
    ModelNotFound,
    OverfillError,
    Overloaded,
    PermissionDenied,
    PromptTooLong,
    Unauthenticated,
    Unavailable,
)

_INVALID = "invalid_request_error"
_MAX_MESSAGE = 2048  # characters
_MAX_PARAM = 200

NOT_SERVED: Mapping[str, Sequence[str]] = {
    "POST /tokenize counts the tokens of messages": ("/v1/responses/input_tokens",),
    "this server stores no responses: it cannot show, delete or cancel one, or compact a conversation; send all "
    "items of the conversation to POST /v1/responses, and close the connection to cancel": ("/v1/responses/",),
    "this server does not have Ollama's or TGI's API; it speaks OpenAI's (POST /v1/chat/completions)": (
        "/api/chat",
        "/api/generate",
        "/api/tags",
        "/generate",
        "/generate_stream",
        "/invocations",
    ),
    "the served model writes text; it makes no embeddings, scores, images or audio": (
        "/v1/embeddings",
        "/v1/rerank",
        "/v1/score",
        "/v1/moderations",
        "/v1/images",
        "/v1/audio",
        "/v1/realtime",
        "/v2/rerank",
        "/rerank",
        "/score",
        "/pooling",
        "/classify",
    ),
    "this server stores nothing; send each request to POST /v1/chat/completions": (
        "/v1/assistants",
        "/v1/batches",
        "/v1/conversations",
        "/v1/files",
        "/v1/fine_tuning",
        "/v1/threads",
        "/v1/uploads",
        "/v1/vector_stores",
    ),
    "below /v1/messages there is count_tokens only, and no path ends in a slash; this server stores nothing, so it has "
    "no batches": ("/v1/messages/",),
    "paths begin with /v1; give the client a base URL that ends in /v1": (
        "/chat/completions",
        "/completions",
        "/messages",
        "/models",
        "/responses",
    ),
    "the client adds /v1 itself; give it a base URL that does not end in /v1": ("/v1/v1",),
    "GET /health says whether the server can answer requests": ("/ping",),
    "GET /status has the load of the router and its workers": ("/load", "/server_info"),
    "there is no OpenAPI description; the page 'OpenAI API' of the reference lists every route and field": (
        "/docs",
        "/openapi.json",
        "/redoc",
    ),
    "the tokenizer's files are in the pair's folder; POST /tokenize and /detokenize use them": ("/tokenizer_info",),
}
"""What the server says instead of a route that clients of OpenAI, vLLM and others ask for, and the routes.

A route that ends in a slash stands for the paths below it only. Of several that a path is below, the first counts.
"""

# Patterns of our field paths, and the names that OpenAI has for these fields.
_PARAMS = (
    (re.compile(r"^sampling\.max_tokens$"), "max_tokens"),
    (re.compile(r"^(chat\.(?:.*\.)?(?:tools|tool_calls)\[\d+\])\.(\w+)$"), r"\1.function.\2"),
    (re.compile(r"^(sampling|chat)\."), ""),
    (re.compile(r"^(token_ids\.ids|text|prompt)$"), "prompt"),
    (re.compile(r"^chat$"), "messages"),
)


@dataclass(eq=False)
class ApiError(Exception):
    """An HTTP error response.

    Attributes:
        status: HTTP status code.
        message: Text for the user.
        type, code: Kind of the error, as in OpenAI's reference.
        param: Name of the wrong part of the request; None if the error is about no single part.
        retry_after: Seconds after which to try again; None means unknown.
    """

    status: int
    message: str
    type: str = _INVALID
    param: str | None = None
    code: str | None = None
    retry_after: int | None = None

    @property
    def body(self) -> dict[str, Any]:
        """The response's JSON. It cuts what it repeats of a request, whose names may have megabytes."""
        param = None if self.param is None else _cut(self.param, _MAX_PARAM)
        return {
            "error": {"message": _cut(self.message, _MAX_MESSAGE), "type": self.type, "param": param, "code": self.code}
        }

    @property
    def headers(self) -> dict[str, str]:
        return {} if self.retry_after is None else {"retry-after": str(self.retry_after)}


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[:length]}…"


def unknown_url(method: str, path: str) -> ApiError:
    message = f"Invalid URL ({method} {path[:200]})"
    for hint, routes in NOT_SERVED.items():
        if any(path == route or path.startswith(f"{route.removesuffix('/')}/") for route in routes):
            message += f": {hint}"
            break
    return ApiError(404, message, code="unknown_url")


def wrong_method(method: str, path: str) -> ApiError:
    return ApiError(405, f"Not allowed to {method} on {path[:200]}", code="method_not_supported")


def foreign(header: str, value: str, reason: str) -> ApiError:
    return ApiError(403, f"{header} {value[:100]!r}: {reason}", "permission_error", code=f"foreign_{header}")


def too_large(limit: int) -> ApiError:
    return ApiError(
        413, f"the request is larger than {limit} bytes, the limit of this server", code="request_too_large"
    )


def not_json(content_type: str) -> ApiError:
    return ApiError(
        415,
        f"content type {content_type[:100]!r} is not supported; send application/json",
        code="unsupported_content_type",
    )


def too_slow() -> ApiError:
    return ApiError(408, "the body of the request did not arrive in time", code="request_timeout")


def too_many_connections() -> ApiError:
    return ApiError(
        503,
        "the server has too many connections; try again later",
        "service_unavailable_error",
        code="too_many_connections",
        retry_after=1,
    )


def from_error(error: OverfillError) -> ApiError:
    """The HTTP error response for ``error``."""
    match error:
        case PromptTooLong():
            return ApiError(400, _message(error), param=_param(error.field), code="context_length_exceeded")
        case InvalidRequest():
            return ApiError(400, _message(error), param=_param(error.field), code="invalid_value")
        case ModelNotFound():
            return ApiError(404, str(error), param="model", code="model_not_found")
        case Unauthenticated():
            return ApiError(401, str(error), code="invalid_api_key")
        case PermissionDenied():
            return ApiError(403, str(error), "permission_error", code="insufficient_scope")
        case Overloaded():
            wait = max(1, math.ceil(error.retry_after or 1))
            return ApiError(429, str(error), "rate_limit_error", code="rate_limit_exceeded", retry_after=wait)
        case DeadlineExceeded():
            return ApiError(504, str(error), "timeout_error", code="deadline_exceeded")
        case Unavailable():
            return ApiError(503, str(error), "service_unavailable_error", code="service_unavailable", retry_after=1)
        case _:
            return ApiError(500, str(error), "server_error", code="internal_error")


def adapter_error(error: OverfillError, message: str = "") -> ApiError:
    """Returns the HTTP error response for ``error`` of a change of adapters; ``message`` replaces its own if given."""
    param = "lora_name"
    match error:
        case InvalidRequest(field="name"):
            made = ApiError(400, f"'{param}' {error.reason}", param=param, code="invalid_value")
        case ModelNotFound():
            made = ApiError(404, str(error), param=param, code="model_not_found")
        case Incompatible():
            made = ApiError(409, str(error), param=param, code="conflict")
        case _:
            made = from_error(error)
    return replace(made, message=message or made.message)


def _message(error: InvalidRequest) -> str:
    """The message of ``error`` with OpenAI's name of the field."""
    reason = error.reason
    param = _param(error.field)
    return f"'{param}' {reason}" if param else reason


def _param(field: str) -> str | None:
    for pattern, replacement in _PARAMS:
        field = pattern.sub(replacement, field)
    return field or None

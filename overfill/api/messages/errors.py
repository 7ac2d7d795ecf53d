"""Errors in the format of Anthropic's API."""

from __future__ import annotations

from collections.abc import Container
from typing import Any

from overfill.api.openai.errors import ApiError

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    504: "timeout_error",
}

THREAD_UNSUPPORTED = "thread_unsupported_request"
"""Code of an error after which Anthropic's clients send the whole conversation, without ``thread``."""


def is_anthropic(path: str, headers: Container[bytes]) -> bool:
    """True if the client expects the form of Anthropic's API: of errors, and of what all routes have."""
    return path.startswith("/v1/messages") or b"anthropic-version" in headers


def error_body(error: ApiError, request_id: str) -> dict[str, Any]:
    """Returns the JSON of ``error``."""
    kind = _TYPES.get(error.status, "invalid_request_error" if error.status < 500 else "api_error")
    content: dict[str, Any] = {"type": kind, "message": error.body["error"]["message"]}
    if error.code == THREAD_UNSUPPORTED:
        content["details"] = {"error_code": error.code, "unsupported": []}
    return {"type": "error", "error": content, "request_id": request_id}

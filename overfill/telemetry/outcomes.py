"""Labels of metrics and logs for how a request has ended, from its error."""

from __future__ import annotations

import asyncio

from overfill.errors import (
    DeadlineExceeded,
    Incompatible,
    InvalidRequest,
    ModelNotFound,
    Overloaded,
    PermissionDenied,
    PromptTooLong,
    RequestCancelled,
    ShuttingDown,
    TransferFailed,
    Unauthenticated,
    Unavailable,
)

REFUSALS = (
    "queue_full", "deadline", "max_wait", "key_rate", "key_concurrency", "router_busy", "grammars", "too_long",
    "invalid", "not_found", "shutting_down", "other",
)  # fmt: skip
"""Reasons for refusing a request. The first ones are the values of ``Overloaded.reason`` that the router sets."""

_OUTCOMES: dict[type[BaseException], str] = {
    PromptTooLong: "too_long",
    InvalidRequest: "invalid",
    ModelNotFound: "not_found",
    Unauthenticated: "unauthenticated",
    PermissionDenied: "forbidden",
    Overloaded: "overloaded",
    Incompatible: "incompatible",
    TransferFailed: "transfer_failed",
    DeadlineExceeded: "deadline",
    RequestCancelled: "cancelled",
    ShuttingDown: "shutting_down",
    Unavailable: "unavailable",
    asyncio.CancelledError: "cancelled",
    GeneratorExit: "cancelled",
}
OUTCOMES = tuple(dict.fromkeys(("ok", *_OUTCOMES.values(), "internal")))


def outcome_of(error: BaseException | None) -> str:
    """Returns the outcome label of an error: "ok" for None, "internal" for an exception without its own label."""
    if error is None:
        return "ok"
    return next((_OUTCOMES[kind] for kind in type(error).__mro__ if kind in _OUTCOMES), "internal")


def refusal_reason(error: BaseException) -> str:
    """Returns the label for the reason of a refused request."""
    reason = error.reason if isinstance(error, Overloaded) else outcome_of(error)
    return reason if reason in REFUSALS else "other"

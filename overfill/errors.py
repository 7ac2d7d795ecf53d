"""Every error a user of the library, the SDK or a service can meet.

::

    OverfillError
    ├── InvalidRequest        the request is wrong; ``field`` names the part          INVALID_ARGUMENT
    │   └── PromptTooLong     prompt and answer do not fit the context                INVALID_ARGUMENT
    ├── ModelNotFound         no such model here                                      NOT_FOUND
    ├── Unauthenticated       no API key, or a wrong one                              UNAUTHENTICATED
    ├── PermissionDenied      who calls is known, and may not call this               PERMISSION_DENIED
    ├── Overloaded            no capacity now; ``retry_after`` seconds, if known      RESOURCE_EXHAUSTED
    ├── Incompatible          the two ends do not fit; ``fields`` differ              FAILED_PRECONDITION
    ├── InvalidPair           a pair folder is damaged or its halves do not fit       FAILED_PRECONDITION
    │   └── UnsupportedModel  an architecture or option that the engine does not run  FAILED_PRECONDITION
    ├── SourceUnavailable     a model cannot be fetched from where it was asked for   (local)
    ├── TransferFailed        KV did not arrive whole and right                       DATA_LOSS
    ├── DeadlineExceeded      the request's deadline passed                           DEADLINE_EXCEEDED
    ├── RequestCancelled      the caller gave up                                      CANCELLED
    ├── Unavailable           a peer cannot be reached or was lost                    UNAVAILABLE
    │   ├── ShuttingDown      a process is leaving; another one may take the request  UNAVAILABLE
    │   └── Unreachable       no connection to an address                             UNAVAILABLE
    └── InternalError         a fault of ours                                         INTERNAL

``overfill.rpc.status`` maps them to gRPC status codes and back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Produced:
    """What there is of an answer that could not be finished.

    To go on with it, ask again with ``resume_token_ids=token_ids`` and ``sampling.seed=seed``.

    Attributes:
        text: less than ``token_ids`` when a character, or what may become a stop string, was incomplete.
        token_ids: without those that were given as ``resume_token_ids``.
    """

    text: str
    token_ids: tuple[int, ...]
    request_id: str
    seed: int


class OverfillError(Exception):
    """Base of all errors raised on purpose.

    Attributes:
        produced: what the SDK had received of the answer; None when the request was not taken, and for errors of
            something else than a request.
        trace_id: of the trace that the request was in where the error came from; empty without one.
    """

    produced: Produced | None = None
    trace_id: str = ""


class InvalidRequest(OverfillError):
    """The request is wrong. ``field`` is its path in the request, such as ``sampling.top_p``."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}" if field else message)
        self.field = field


class PromptTooLong(InvalidRequest):
    """The prompt, or the prompt with its answer, does not fit; the message gives both numbers."""


class ModelNotFound(OverfillError):
    """The requested model is not served here."""


class Unauthenticated(OverfillError):
    """The request comes without an API key, or with one that nobody holds."""


class PermissionDenied(OverfillError):
    """Who calls is known, and may not call this: a certificate of another role, or a key without the scope."""


class Overloaded(OverfillError):
    """No capacity now. ``retry_after`` is in seconds, or None when it is not known; ``reason`` is for counting."""

    def __init__(self, message: str, retry_after: float | None = None, reason: str = "") -> None:
        super().__init__(message)
        self.retry_after = retry_after
        self.reason = reason


class Incompatible(OverfillError):
    """Two processes hold different models or speak different versions; ``fields`` lists what differs."""

    def __init__(self, message: str, fields: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.fields = tuple(fields)


class InvalidPair(OverfillError):
    """A pair folder lacks a file, has a wrong digest, or its halves do not fit."""


class UnsupportedModel(InvalidPair):
    """A checkpoint uses an architecture or option that the engine does not run; the message names it."""


class TransferFailed(OverfillError):
    """A KV transfer brought a wrong, missing or damaged chunk, stalled, or took too long."""


class DeadlineExceeded(OverfillError):
    """The deadline of the request passed."""


class RequestCancelled(OverfillError):
    """The caller cancelled, or vanished."""


class Unavailable(OverfillError):
    """A peer cannot be reached, or was lost on the way."""


class Unreachable(Unavailable):
    """There is no connection to an address, or it broke: gRPC says so, not a process behind it."""


class ShuttingDown(Unavailable):
    """A process is leaving, and takes or finishes nothing any more; another one may."""


class InternalError(OverfillError):
    """A fault inside a worker; the request failed, the worker lives."""

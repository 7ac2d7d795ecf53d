"""All errors that the library, the SDK and the services raise on purpose.

::

    OverfillError
    ├── InvalidRequest        the request is wrong; ``field`` names the part          INVALID_ARGUMENT
    │   └── PromptTooLong     prompt and answer do not fit the context                INVALID_ARGUMENT
    ├── ModelNotFound         no such model here                                      NOT_FOUND
    ├── Unauthenticated       no API key, or a wrong one                              UNAUTHENTICATED
    ├── PermissionDenied      the caller is known and may not call this               PERMISSION_DENIED
    ├── Overloaded            no capacity now; ``retry_after`` seconds, if known      RESOURCE_EXHAUSTED
    ├── Incompatible          the two ends do not fit; ``fields`` differ              FAILED_PRECONDITION
    ├── InvalidPair           a pair folder is damaged or its halves do not fit       FAILED_PRECONDITION
    │   └── UnsupportedModel  an architecture or option that the engine does not run  FAILED_PRECONDITION
    ├── InvalidAdapter        an adapter's folder is damaged or does not fit          (local)
    ├── SourceUnavailable     a model cannot be fetched from the given source         (local)
    ├── NotEnoughMemory       a device cannot hold a model, its steps and a KV cache  (local)
    ├── TransferFailed        KV arrived incomplete or damaged, or not in time        DATA_LOSS
    ├── DeadlineExceeded      the request's deadline passed                           DEADLINE_EXCEEDED
    ├── RequestCancelled      the caller cancelled the request                        CANCELLED
    ├── Unavailable           a peer cannot be reached or was lost                    UNAVAILABLE
    │   ├── ShuttingDown      a process shuts down; another one may accept requests   UNAVAILABLE
    │   └── Unreachable       no connection to an address                             UNAVAILABLE
    └── InternalError         a fault inside OverFill                                 INTERNAL
        └── StepFailed        a failed step with the request in it ended a worker     INTERNAL

``overfill.rpc.status`` maps them to gRPC status codes and back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Produced:
    """The part of an answer that arrived before the request failed.

    To continue the answer, send the request again with ``resume_token_ids=token_ids``, ``resume_identity=identity``,
    ``sampling.seed=seed`` and ``tier=tier``.

    Attributes:
        text: Text of ``token_ids``, without an incomplete character or possible stop string at the end.
        token_ids: New tokens; those given as ``resume_token_ids`` are not repeated.
        request_id: Id of the failed request.
        seed: Seed that the router used.
        tier: Tier that wrote the last token; empty means that the router did not say.
        identity: What the answer depends on, an ``overfill.client.AnswerIdentity``.
        reasoning: What the model thought before ``text``.
    """

    text: str
    token_ids: tuple[int, ...]
    request_id: str
    seed: int
    tier: str = ""
    identity: Any = None
    reasoning: str = ""


class OverfillError(Exception):
    """Base class of all errors that OverFill raises on purpose.

    Attributes:
        produced: The part of the answer that the SDK had received. None means that no router accepted the request, or
            that the error does not belong to a request.
        trace_id: Id of the request's trace in the process that raised the error; empty when it traces nothing.
    """

    produced: Produced | None = None
    trace_id: str = ""


class InvalidRequest(OverfillError):
    """The request is wrong. ``field`` is the path of what is wrong, such as ``sampling.top_p``; ``reason`` says why."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}" if field else message)
        self.field, self.reason = field, message

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.field, self.reason)  # pickle would give the one argument of Exception


class PromptTooLong(InvalidRequest):
    """The prompt, or prompt and answer together, exceed the context; the message gives both lengths.

    Attributes:
        tokens, limit: Length of the prompt and the longest that fits, in tokens. 0 means unknown: errors that come from
            another process have neither.
    """

    def __init__(self, field: str, message: str, tokens: int = 0, limit: int = 0) -> None:
        super().__init__(field, message)
        self.tokens = tokens
        self.limit = limit


class ModelNotFound(OverfillError):
    """This router does not serve the requested model."""


class Unauthenticated(OverfillError):
    """The request has no API key, or one that is not in the server's key file."""


class PermissionDenied(OverfillError):
    """The caller is known and may not make this call: its certificate's role or its key's scopes do not allow it."""


class Overloaded(OverfillError):
    """The server has no capacity now.

    Attributes:
        retry_after: Seconds after which to try again; None means unknown.
        reason: Short name of the limit that was reached, for metrics.
    """

    def __init__(self, message: str, retry_after: float | None = None, reason: str = "") -> None:
        super().__init__(message)
        self.retry_after = retry_after
        self.reason = reason


class Incompatible(OverfillError):
    """Two processes hold different models or speak different wire versions; ``fields`` lists the differences."""

    def __init__(self, message: str, fields: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.fields = tuple(fields)


class InvalidPair(OverfillError):
    """A pair folder lacks a file or has a wrong digest, or its two models do not fit each other."""


class UnsupportedModel(InvalidPair):
    """A checkpoint uses an architecture or option that the engine does not run; the message names it."""


class TransferFailed(OverfillError):
    """A KV transfer delivered a wrong or damaged chunk, missed one, stalled, or took too long."""


class DeadlineExceeded(OverfillError):
    """The request's deadline has passed."""


class RequestCancelled(OverfillError):
    """The caller cancelled the request or closed its connection."""


class Unavailable(OverfillError):
    """A peer cannot be reached, or the connection to it was lost during the call."""


class Unreachable(Unavailable):
    """The connection to an address failed or broke. gRPC itself reports this; no process answered."""


class ShuttingDown(Unavailable):
    """A process shuts down and neither accepts nor finishes requests. Another process may serve the request."""


class InternalError(OverfillError):
    """A fault inside OverFill: the request failed, and the process continues to run."""


class StepFailed(InternalError):
    """A step that computed this request failed and has ended its worker. A router refuses a request after two."""

"""Converts errors to gRPC statuses and back, with their class, fields and message.

What the status code cannot express travels in ``grpc-status-details-bin`` as a ``google.rpc.Status``: ErrorInfo
(class and ``fields``), BadRequest (``field``), RetryInfo (``retry_after``).
"""

from __future__ import annotations

import logging
import re
import secrets
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple, TypeVar, cast

import grpc
from google.protobuf.message import DecodeError, Message
from google.rpc import error_details_pb2, status_pb2  # type: ignore[import-untyped]

from overfill.errors import (
    DeadlineExceeded,
    Incompatible,
    InternalError,
    InvalidPair,
    InvalidRequest,
    ModelNotFound,
    OverfillError,
    Overloaded,
    PermissionDenied,
    PromptTooLong,
    RequestCancelled,
    ShuttingDown,
    StepFailed,
    TransferFailed,
    Unauthenticated,
    Unavailable,
    Unreachable,
    UnsupportedModel,
)
from overfill.telemetry.tracing import TRACE_ID

M = TypeVar("M", bound=Message)

logger = logging.getLogger(__name__)

DETAILS_KEY = "grpc-status-details-bin"
_DOMAIN = "overfill"
_MAX_MESSAGE_BYTES = 2048

_CODES: dict[type[OverfillError], grpc.StatusCode] = {
    InvalidRequest: grpc.StatusCode.INVALID_ARGUMENT,
    PromptTooLong: grpc.StatusCode.INVALID_ARGUMENT,
    ModelNotFound: grpc.StatusCode.NOT_FOUND,
    Unauthenticated: grpc.StatusCode.UNAUTHENTICATED,
    PermissionDenied: grpc.StatusCode.PERMISSION_DENIED,
    Overloaded: grpc.StatusCode.RESOURCE_EXHAUSTED,
    Incompatible: grpc.StatusCode.FAILED_PRECONDITION,
    InvalidPair: grpc.StatusCode.FAILED_PRECONDITION,
    UnsupportedModel: grpc.StatusCode.FAILED_PRECONDITION,
    TransferFailed: grpc.StatusCode.DATA_LOSS,
    DeadlineExceeded: grpc.StatusCode.DEADLINE_EXCEEDED,
    RequestCancelled: grpc.StatusCode.CANCELLED,
    Unavailable: grpc.StatusCode.UNAVAILABLE,
    ShuttingDown: grpc.StatusCode.UNAVAILABLE,
    InternalError: grpc.StatusCode.INTERNAL,
    StepFailed: grpc.StatusCode.INTERNAL,
}
_BY_NAME = {cls.__name__: cls for cls in _CODES}

# Classes for statuses that gRPC itself or another program made.
_BY_CODE: dict[grpc.StatusCode, type[OverfillError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidRequest,
    grpc.StatusCode.NOT_FOUND: ModelNotFound,
    grpc.StatusCode.UNAUTHENTICATED: Unauthenticated,
    grpc.StatusCode.PERMISSION_DENIED: PermissionDenied,
    grpc.StatusCode.RESOURCE_EXHAUSTED: Overloaded,
    grpc.StatusCode.FAILED_PRECONDITION: Incompatible,
    grpc.StatusCode.UNIMPLEMENTED: Incompatible,
    grpc.StatusCode.DATA_LOSS: TransferFailed,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceeded,
    grpc.StatusCode.CANCELLED: RequestCancelled,
    grpc.StatusCode.UNAVAILABLE: Unreachable,
}


class StatusDetails(NamedTuple):
    """Arguments of ``context.abort``."""

    code: grpc.StatusCode
    message: str
    trailing_metadata: tuple[tuple[str, str | bytes], ...]


def to_status(exc: BaseException) -> StatusDetails:
    """Returns the status that reports ``exc`` to a client.

    The error of a failed call to another server is passed on. An exception group counts as its most unexpected member.
    Any other exception becomes INTERNAL with an incident id, and the log gets its traceback.

    Raises:
        BaseException: ``exc`` itself if it is not an Exception, such as asyncio.CancelledError.
    """
    return _encode(as_overfill_error(exc))


def as_overfill_error(exc: BaseException) -> OverfillError:
    """Returns the error that a client gets for ``exc``; see ``to_status``."""
    if isinstance(exc, BaseExceptionGroup):
        leaves = list(_leaves(exc))
        exc = next((e for e in leaves if not isinstance(e, OverfillError | grpc.RpcError)), leaves[0])
    if isinstance(exc, grpc.RpcError):
        exc = from_rpc_error(exc)
    if isinstance(exc, OverfillError):
        return exc
    if not isinstance(exc, Exception):
        raise exc
    incident = secrets.token_hex(4)
    logger.error("incident %s: unexpected %s", incident, type(exc).__name__, exc_info=exc)
    return InternalError(f"internal error: the server's log has the details under incident {incident}")


def to_bytes(exc: BaseException) -> bytes:
    """Returns ``exc`` as a serialized ``google.rpc.Status``, for messages that carry errors. As ``to_status``."""
    details = dict(_encode(as_overfill_error(exc)).trailing_metadata)[DETAILS_KEY]
    assert isinstance(details, bytes)
    return details


def from_bytes(data: bytes, peer: str = "") -> OverfillError:
    """Returns the error that ``to_bytes`` wrote. Bytes that are no such error become an InternalError."""
    try:
        status = status_pb2.Status.FromString(data)
    except DecodeError:
        status = status_pb2.Status()
    codes = {code.value[0]: code for code in grpc.StatusCode}
    code = codes.get(status.code, grpc.StatusCode.INTERNAL)
    return _from_status(code, status.message or "the error is not readable", status, peer)


def from_rpc_error(err: grpc.RpcError, peer: str = "") -> OverfillError:
    """Returns the error for ``err``. ``peer`` names the other end in messages that gRPC itself wrote."""
    error = _from_status(err.code(), err.details() or err.code().name, _attached_status(err), peer)
    if trace_id := _trailers(err).get(TRACE_ID):
        error.trace_id = str(trace_id)
    return error


def _from_status(code: grpc.StatusCode, message: str, status: status_pb2.Status, peer: str) -> OverfillError:
    info = _unpack(status, error_details_pb2.ErrorInfo())
    bad_request = _unpack(status, error_details_pb2.BadRequest())
    field = bad_request.field_violations[0].field if bad_request.field_violations else ""

    if info.domain == _DOMAIN and info.reason in _BY_NAME:
        cls = _BY_NAME[info.reason]
        message = status.message
        if field:
            message = message.removeprefix(f"{field}: ")
    else:
        cls = _BY_CODE.get(code, InternalError)
        if code is grpc.StatusCode.RESOURCE_EXHAUSTED and "larger than max" in message:
            cls = InvalidRequest  # gRPC's limit on message size, not a lack of capacity
        if peer:
            message = f"{peer}: {_plain(message)}"

    return _rebuilt(cls, message, field, status, info)


def _plain(message: str) -> str:
    """Rewords gRPC's message about a failed connection, so that it says what to do."""
    if "errors resolving" in message or "DNS resolution failed" in message:
        return "no host of this name is known here: check the name, or give the host's IP address"
    if "failed to connect to all addresses" not in message:
        return message
    if "http1.x server" in message:
        return "this port speaks HTTP/1: give the router's gRPC port, which is 7600 by default (overfill up --grpc)"
    if "Hostname Verification Check failed" in message:
        return (
            "its certificate does not name this address, or its role where the name is overfill: give a name that it "
            "has (--tls-name, tls_name), or make certificates for each role with `overfill certs`"
        )
    if found := re.search("CERTIFICATE_VERIFY_FAILED: ([^:]+)", message):
        return f"its certificate is not valid for the authorities in --tls-ca: {found[1]}"
    if "Connection refused" in message:
        return "nothing listens there"
    found = re.search(r" (?:error|connect): ([A-Z][\w ]+?)(?: \(\d+\))?$", message)
    return f"cannot connect: {found[1]}" if found else message


def _rebuilt(
    cls: type[OverfillError], message: str, field: str, status: status_pb2.Status, info: error_details_pb2.ErrorInfo
) -> OverfillError:
    if issubclass(cls, InvalidRequest):
        return cls(field, message)
    if cls is Overloaded:
        retry = _unpack(status, error_details_pb2.RetryInfo())
        delay = retry.retry_delay
        return Overloaded(message, delay.seconds + delay.nanos / 1e9 if retry.HasField("retry_delay") else None)
    if cls is Incompatible:
        fields = info.metadata.get("fields", "")
        return Incompatible(message, fields.split(",") if fields else ())
    return cls(message)


def is_word_of_peer(err: grpc.RpcError) -> bool:
    """Returns True if a process of a stack sent ``err``, and False if gRPC itself made it about a connection."""
    return bool(_unpack(_attached_status(err), error_details_pb2.ErrorInfo()).domain == _DOMAIN)


def _encode(error: OverfillError) -> StatusDetails:
    cls = next(c for c in type(error).__mro__ if c in _CODES or c is OverfillError)
    if cls is OverfillError:
        cls = InternalError
    code = _CODES[cls]
    message = _clean(str(error))
    info = error_details_pb2.ErrorInfo(reason=cls.__name__, domain=_DOMAIN)
    if isinstance(error, Incompatible):
        info.metadata["fields"] = ",".join(error.fields)
    number, _ = code.value
    status = status_pb2.Status(code=number, message=message)
    status.details.add().Pack(info)
    if isinstance(error, InvalidRequest):
        violation = error_details_pb2.BadRequest.FieldViolation(
            field=_clean(error.field), description=message.removeprefix(f"{error.field}: ")
        )
        status.details.add().Pack(error_details_pb2.BadRequest(field_violations=[violation]))
    if isinstance(error, Overloaded) and error.retry_after is not None:
        retry = error_details_pb2.RetryInfo()
        retry.retry_delay.FromNanoseconds(round(error.retry_after * 1e9))
        status.details.add().Pack(retry)
    return StatusDetails(code, message, ((DETAILS_KEY, status.SerializeToString()),))


def _trailers(err: grpc.RpcError) -> dict[str, Any]:
    return dict(cast(Iterable[tuple[str, Any]], err.trailing_metadata() or ()))


def _attached_status(err: grpc.RpcError) -> status_pb2.Status:
    try:
        return status_pb2.Status.FromString(_trailers(err).get(DETAILS_KEY, b""))
    except DecodeError:
        return status_pb2.Status()


def _unpack(status: status_pb2.Status, into: M) -> M:
    """Returns ``into``, filled from the status's first detail of its type; empty when none is present."""
    for detail in status.details:
        if detail.Is(into.DESCRIPTOR):
            try:
                detail.Unpack(into)
            except DecodeError:
                into.Clear()
            break
    return into


def _clean(text: str) -> str:
    """Makes ``text`` valid UTF-8 and cuts it, because trailers have a size limit and sending a status must not fail."""
    data = text.encode("utf-8", errors="replace")
    if len(data) <= _MAX_MESSAGE_BYTES:
        return data.decode()
    return data[:_MAX_MESSAGE_BYTES].decode(errors="ignore") + "…"


def _leaves(group: BaseExceptionGroup[BaseException]) -> Iterator[BaseException]:
    for exc in group.exceptions:
        if isinstance(exc, BaseExceptionGroup):
            yield from _leaves(exc)
        else:
            yield exc

"""Tests that errors survive gRPC with their class, message and fields."""

from __future__ import annotations

import asyncio
import logging

import grpc
import pytest
from rpc_errors import FakeRpcError

from overfill import errors
from overfill.rpc.status import DETAILS_KEY, from_rpc_error, to_status

ERRORS = [
    errors.InvalidRequest("sampling.top_p", "must be in (0, 1], got 2"),
    errors.InvalidRequest("", "no prompt"),
    errors.PromptTooLong("prompt", "9 tokens do not fit the context of 8"),
    errors.Unauthenticated("no key"),
    errors.PermissionDenied("the key of ci has no scope admin"),
    errors.ModelNotFound("no model 'x'; served: 'y'"),
    errors.Overloaded("queue full", retry_after=1.5),
    errors.Overloaded("queue full", retry_after=0.0),
    errors.Overloaded("queue full"),
    errors.Incompatible("they differ", ["kv.dtype", "kv.rope.theta"]),
    errors.Incompatible("they differ"),
    errors.InvalidPair("no pair.json"),
    errors.UnsupportedModel("MambaForCausalLM"),
    errors.TransferFailed("bad checksum"),
    errors.DeadlineExceeded("too late"),
    errors.RequestCancelled("gone"),
    errors.Unavailable("gone"),
    errors.ShuttingDown("draining"),
    errors.InternalError("oops: ünïcode"),
    errors.StepFailed("decode failed and ended its worker"),
]


def over_the_wire(exc: BaseException, peer: str = "") -> errors.OverfillError:
    return from_rpc_error(FakeRpcError(*to_status(exc)), peer)


def all_error_classes(root: type = errors.OverfillError) -> set[type]:
    return {c for sub in root.__subclasses__() for c in {sub} | all_error_classes(sub)}


@pytest.mark.parametrize("error", ERRORS, ids=repr)
def test_class_message_and_fields_survive(error: errors.OverfillError) -> None:
    received = over_the_wire(error, peer="127.0.0.1:1")
    assert type(received) is type(error)
    assert str(received) == str(error)
    assert vars(received) == vars(error)


def test_every_error_class_is_covered() -> None:
    defined = {c for c in all_error_classes() if c.__module__ == errors.__name__}
    assert {type(e) for e in ERRORS} == defined - {errors.Unreachable}


def test_an_unreachable_worker_does_not_make_the_router_look_unreachable() -> None:
    assert type(over_the_wire(errors.Unreachable("10.0.0.1:7: nothing listens there"))) is errors.Unavailable


def test_codes_are_those_the_error_tree_documents() -> None:
    for error in ERRORS:
        line = next(line for line in errors.__doc__.splitlines() if f"─ {type(error).__name__} " in line)
        assert to_status(error).code.name == line.split()[-1]


def test_clients_without_our_library_find_the_field_in_bad_request() -> None:
    from google.rpc import error_details_pb2, status_pb2

    _, _, trailers = to_status(ERRORS[0])
    status = status_pb2.Status.FromString(dict(trailers)[DETAILS_KEY])
    bad_request = error_details_pb2.BadRequest()
    assert any(detail.Unpack(bad_request) for detail in status.details)
    assert bad_request.field_violations[0].field == "sampling.top_p"
    assert bad_request.field_violations[0].description == "must be in (0, 1], got 2"


def test_an_unforeseen_exception_tells_the_client_an_incident_and_the_log_everything(
    caplog: pytest.LogCaptureFixture,
) -> None:
    try:
        raise KeyError("password=hunter2")
    except KeyError as error:
        with caplog.at_level(logging.ERROR):
            code, message, _ = to_status(error)
    assert code is grpc.StatusCode.INTERNAL
    assert "hunter2" not in message
    incident = message.split("incident ")[1].split()[0]
    assert incident in caplog.text
    assert "hunter2" in caplog.text
    assert "Traceback" in caplog.text


def test_cancellation_is_raised_on() -> None:
    with pytest.raises(asyncio.CancelledError):
        to_status(asyncio.CancelledError())
    with pytest.raises(asyncio.CancelledError):
        to_status(BaseExceptionGroup("", [asyncio.CancelledError()]))


def test_a_task_group_error_is_judged_by_its_members() -> None:
    late = errors.DeadlineExceeded("late")
    assert to_status(ExceptionGroup("g", [late])).code is grpc.StatusCode.DEADLINE_EXCEEDED
    nested = ExceptionGroup("g", [late, ExceptionGroup("h", [ZeroDivisionError()])])
    assert to_status(nested).code is grpc.StatusCode.INTERNAL


def test_a_failed_upstream_call_passes_its_status_on() -> None:
    upstream = FakeRpcError(*to_status(errors.Overloaded("full", retry_after=2)))
    received = over_the_wire(upstream)
    assert isinstance(received, errors.Overloaded)
    assert received.retry_after == 2


def test_a_subclass_made_elsewhere_travels_as_its_parent() -> None:
    class Mine(errors.Unavailable):
        pass

    assert type(over_the_wire(Mine("gone"))) is errors.Unavailable
    assert type(over_the_wire(errors.OverfillError("?"))) is errors.InternalError


@pytest.mark.parametrize(
    ("code", "details", "expected"),
    [
        (grpc.StatusCode.UNAVAILABLE, "Socket closed", errors.Unreachable),
        (grpc.StatusCode.DEADLINE_EXCEEDED, "Deadline Exceeded", errors.DeadlineExceeded),
        (grpc.StatusCode.CANCELLED, "", errors.RequestCancelled),
        (grpc.StatusCode.UNIMPLEMENTED, "Method not found!", errors.Incompatible),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, "Concurrent RPC limit exceeded!", errors.Overloaded),
        (
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            "SERVER: Received message larger than max (9 vs. 8)",
            errors.InvalidRequest,
        ),
        (grpc.StatusCode.UNKNOWN, "?", errors.InternalError),
    ],
)
def test_statuses_that_grpc_made_up_name_the_peer(
    code: grpc.StatusCode, details: str, expected: type[errors.OverfillError]
) -> None:
    received = from_rpc_error(FakeRpcError(code, details), peer="10.0.0.1:7")
    assert type(received) is expected
    assert str(received) == f"10.0.0.1:7: {details or code.name}"


@pytest.mark.parametrize(
    ("details", "says"),
    [
        ("last error: UNKNOWN: ipv4:10.0.0.1:7: connect: Connection refused (111)", "nothing listens there"),
        (
            "last error: UNKNOWN: ipv4:10.0.0.1:7: Custom verification check failed with error: UNAUTHENTICATED: "
            "Hostname Verification Check failed.",
            "its certificate does not name this address, or its role where the name is overfill: give a name that it "
            "has (--tls-name, tls_name), or make certificates for each role with `overfill certs`",
        ),
        (
            "last error: UNKNOWN: ipv4:10.0.0.1:7: Tls handshake failed (TSI_PROTOCOL_FAILURE): SSL_ERROR_SSL: "
            "error:1000007d:SSL routines:OPENSSL_internal:CERTIFICATE_VERIFY_FAILED: unable to get local issuer "
            "certificate: OK",
            "its certificate is not valid for the authorities in --tls-ca: unable to get local issuer certificate",
        ),
        (
            "last error: FAILED_PRECONDITION: unix:/x: connect failed: addr: unix:/x error: No such file or directory",
            "10.0.0.1:7: cannot connect: No such file or directory",
        ),
        ("last error: UNKNOWN: ipv4:10.0.0.1:7: connect: No route to host (113)", "cannot connect: No route to host"),
        ("last error: INTERNAL: ipv4:10.0.0.1:7 (Trying to connect an http1.x server (HTTP status 400))", "gRPC port"),
    ],
)
def test_a_failed_connection_has_a_plain_message(details: str, says: str) -> None:
    message = f"failed to connect to all addresses; {details}"
    received = from_rpc_error(FakeRpcError(grpc.StatusCode.UNAVAILABLE, message), peer="10.0.0.1:7")
    assert says in str(received)
    assert "all addresses" not in str(received)


@pytest.mark.parametrize(
    "details",
    [
        "errors resolving x.invalid:7600: [field:hostname lookup error:address lookup failed for x.invalid:7600: "
        "Domain name not found]",
        "DNS resolution failed for x.invalid:7600: C-ares status is not ARES_SUCCESS qtype=A: Domain name not found",
    ],
)
def test_a_host_that_does_not_resolve_has_a_plain_message(details: str) -> None:
    received = from_rpc_error(FakeRpcError(grpc.StatusCode.UNAVAILABLE, details), peer="x.invalid:7600")
    assert type(received) is errors.Unreachable
    assert str(received).startswith("x.invalid:7600: no host of this name is known here")


def test_damaged_details_fall_back_to_the_code() -> None:
    error = FakeRpcError(grpc.StatusCode.NOT_FOUND, "gone", ((DETAILS_KEY, b"\xff\xff\xff"),))
    assert type(from_rpc_error(error)) is errors.ModelNotFound


@pytest.mark.parametrize("text", ["\ud800", "x" * 100_000, "字" * 50_000])
def test_any_message_can_be_sent(text: str) -> None:
    code, message, trailers = to_status(errors.InvalidRequest("prompt", text))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert len(message.encode()) < 4096
    assert len(dict(trailers)[DETAILS_KEY]) < 8192

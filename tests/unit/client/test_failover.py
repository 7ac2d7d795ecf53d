"""Tests which address a request goes to after a failed call, without sockets."""

from __future__ import annotations

import grpc
import pytest

from overfill.client.failover import AddressFailover
from overfill.errors import OverfillError, ShuttingDown, Unavailable
from overfill.rpc.status import to_status

LEAVES = ShuttingDown("the router shuts down")


class Failure(grpc.RpcError):
    """A failed call: an error that a router has sent, or None if nothing listens at the address."""

    def __init__(self, sent: OverfillError | None = None) -> None:
        refused = (grpc.StatusCode.UNAVAILABLE, "connection refused", ())
        self._code, self._details, self._trailers = refused if sent is None else to_status(sent)

    def code(self) -> grpc.StatusCode:
        return self._code

    def details(self) -> str:
        return self._details

    def trailing_metadata(self):  # type: ignore[no-untyped-def]
        return self._trailers


def test_an_address_where_nothing_listens_after_its_router_left_fails_with_the_router_s_words() -> None:
    failover = AddressFailover(["a:1"], None)
    assert failover.next_address_or_error(Failure(LEAVES)) is None
    error = failover.next_address_or_error(Failure())
    assert isinstance(error, ShuttingDown)
    assert "the router shuts down" in str(error)


def test_a_router_that_never_was_there_fails_at_once() -> None:
    error = AddressFailover(["a:1"], None).next_address_or_error(Failure())
    assert isinstance(error, Unavailable)
    assert "a:1" in str(error)


def test_a_part_of_the_answer_lets_the_next_router_leave_too() -> None:
    failover = AddressFailover(["a:1"], None)
    for _ in range(3):
        assert failover.next_address_or_error(Failure(LEAVES)) is None
        failover.accepted()
        failover.progressed()
    assert failover.next_address_or_error(Failure(LEAVES)) is None
    assert failover.next_address_or_error(Failure(LEAVES)) is not None


@pytest.mark.parametrize("addresses", [["a:1"], ["a:1", "b:1"]])
def test_each_address_gets_a_share_of_the_time_after_a_router_left(addresses: list[str]) -> None:
    failover = AddressFailover(addresses, 8.0, clock=lambda: 0.0, shared=True)
    assert failover.next_address_or_error(Failure(LEAVES)) is None
    assert failover.timeout() == 8.0 / len(addresses)

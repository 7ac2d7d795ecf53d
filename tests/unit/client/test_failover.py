"""Tests which address a request goes to after a failed call, without sockets."""

from __future__ import annotations

import pytest
from rpc_errors import FakeRpcError

from overfill.client.failover import AddressFailover
from overfill.errors import Incompatible, ModelNotFound, OverfillError, PromptTooLong, ShuttingDown, Unavailable
from overfill.rpc.status import to_status

REFUSES = Incompatible("this router would continue another answer", ["resume_identity.decoder_digest"])
LEAVES = ShuttingDown("the router shuts down")


def failed(sent: OverfillError | None = None) -> FakeRpcError:
    """A failed call: an error that a router has sent, or None if nothing listens at the address."""
    return FakeRpcError() if sent is None else FakeRpcError(*to_status(sent))


def test_an_address_where_nothing_listens_after_its_router_left_fails_with_the_router_s_words() -> None:
    failover = AddressFailover(["a:1"], None)
    assert failover.next_address_or_error(failed(LEAVES)) is None
    error = failover.next_address_or_error(failed())
    assert isinstance(error, ShuttingDown)
    assert "the router shuts down" in str(error)


def test_a_router_that_never_was_there_fails_at_once() -> None:
    error = AddressFailover(["a:1"], None).next_address_or_error(failed())
    assert isinstance(error, Unavailable)
    assert "a:1" in str(error)


def test_a_part_of_the_answer_lets_the_next_router_leave_too() -> None:
    failover = AddressFailover(["a:1"], None)
    for _ in range(3):
        assert failover.next_address_or_error(failed(LEAVES)) is None
        failover.accepted()
        failover.progressed()
    assert failover.next_address_or_error(failed(LEAVES)) is None
    assert failover.next_address_or_error(failed(LEAVES)) is not None


@pytest.mark.parametrize("addresses", [["a:1"], ["a:1", "b:1"]])
def test_each_address_gets_a_share_of_the_time_after_a_router_left(addresses: list[str]) -> None:
    failover = AddressFailover(addresses, 8.0, clock=lambda: 0.0, shared=True)
    assert failover.next_address_or_error(failed(LEAVES)) is None
    assert failover.timeout() == 8.0 / len(addresses)


@pytest.mark.parametrize(
    "refuses", [REFUSES, PromptTooLong("prompt", "has 9 tokens"), ModelNotFound("tier 'fast' does not exist")]
)
def test_a_router_that_cannot_continue_an_answer_is_passed_over_and_named_in_the_end(refuses: OverfillError) -> None:
    failover = AddressFailover(["a:1", "b:1", "c:1"], None)
    failover.accepted()
    failover.progressed()
    assert failover.next_address_or_error(failed(), continues=True) is None
    assert failover.next_address_or_error(failed(refuses), continues=True) is None
    assert failover.address == "c:1"
    error = failover.next_address_or_error(failed(), continues=True)
    assert isinstance(error, type(refuses)), "what a router has said tells more than that another one is gone"


def test_an_error_of_a_new_request_is_not_tried_elsewhere() -> None:
    failover = AddressFailover(["a:1", "b:1"], None)
    assert isinstance(failover.next_address_or_error(failed(REFUSES)), Incompatible)

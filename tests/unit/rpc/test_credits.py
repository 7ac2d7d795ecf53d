"""Tests how a worker divides its credits among routers."""

from hypothesis import given
from hypothesis import strategies as st

from overfill.rpc.credits import RouterDemand, divide

DEMANDS = st.lists(st.none() | st.builds(RouterDemand, st.integers(0, 20), st.integers(0, 50)), min_size=1, max_size=6)


def test_routers_without_a_report_have_equal_shares():
    assert divide(12, [None, None]) == [6, 6]
    assert divide(12, [None]) == [12]


def test_idle_routers_share_the_capacity():
    assert divide(12, [RouterDemand(0, 0)] * 3) == [4, 4, 4]


def test_a_router_that_queues_gets_all_unused_credits_but_one():
    assert divide(12, [RouterDemand(6, 20), RouterDemand(0, 0)]) == [11, 1]


def test_two_routers_that_queue_come_to_equal_shares():
    assert divide(12, [RouterDemand(3, 50), RouterDemand(1, 50)]) == [6, 6]
    assert divide(12, [RouterDemand(9, 50), RouterDemand(1, 50)]) == [9, 3], "credits of running requests stay"


def test_every_router_gets_one_credit_even_of_a_tiny_worker():
    assert divide(1, [RouterDemand(1, 5), RouterDemand(0, 5), None]) == [1, 1, 1]


@given(st.integers(1, 64), DEMANDS)
def test_credits_never_exceed_capacity_and_none_is_unused_while_a_router_queues(capacity, demands):
    shares = divide(capacity, demands)
    said = [(share, demand) for share, demand in zip(shares, demands, strict=True) if demand is not None]
    assert all(share >= 1 for share in shares)
    kept = sum(capacity // len(demands) for demand in demands if demand is None)
    used = sum(min(demand.in_use, capacity) for _, demand in said)
    new = sum(max(0, share - min(demand.in_use, capacity)) for share, demand in said)
    assert new <= max(0, capacity - used - kept) + len(said), "except the one credit that every router gets"
    if any(share < demand.in_use + demand.queued for share, demand in said):
        assert used + new >= capacity - kept, "credits are unused while a router queues"


def test_without_capacity_all_credits_are_zero():
    assert divide(0, [None, RouterDemand(1, 5)]) == [0, 0]
    assert divide(8, []) == []

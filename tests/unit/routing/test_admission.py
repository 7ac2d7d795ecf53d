"""Tests admission: the quotas of API keys, and the estimate of waiting time in a queue."""

import pytest

from overfill.errors import InvalidRequest, Overloaded
from overfill.routing.admission import Admission, KeyLimiter, KeyQuota, QueueDepartureRate


def test_a_key_is_limited_in_rate_and_may_burst_after_a_pause():
    limits, two = KeyLimiter(), KeyQuota("a", rate=2.0)
    for _ in range(2):
        limits.acquire("a", two, 0.0)
    with pytest.raises(Overloaded, match="2 requests per second") as caught:
        limits.acquire("a", two, 0.0)
    assert caught.value.retry_after == pytest.approx(0.5)
    limits.acquire("b", two, 0.0)
    limits.acquire("a", two, 0.5)
    with pytest.raises(Overloaded):
        limits.acquire("a", two, 0.6)
    limits.acquire("a", two, 100.0)
    limits.acquire("a", two, 100.0)
    with pytest.raises(Overloaded):
        limits.acquire("a", two, 100.0)


def test_a_key_is_limited_in_concurrent_requests():
    limits, two = KeyLimiter(), KeyQuota("a", concurrency=2)
    limits.acquire("a", two, 0.0)
    limits.acquire("a", two, 0.0)
    with pytest.raises(Overloaded, match="2 requests running") as caught:
        limits.acquire("a", two, 0.0)
    assert caught.value.retry_after is not None
    limits.release("a")
    limits.acquire("a", two, 0.0)


def test_answers_of_one_request_are_admitted_together_or_not_at_all():
    limits = KeyLimiter()
    for limit in (KeyQuota("a", concurrency=4), KeyQuota("a", rate=4.5)):
        limits.acquire("a", limit, 0.0, 2)
        with pytest.raises(Overloaded):
            limits.acquire("a", limit, 0.0, 3)
        limits.acquire("a", limit, 0.0, 2)
        with pytest.raises(InvalidRequest, match=r"n: asks for 5 answers.* at most 4"):
            limits.acquire("a", limit, 100.0, 5)
        limits = KeyLimiter()


@pytest.mark.parametrize("limit", [KeyQuota("ci", concurrency=1), KeyQuota("ci", rate=1.0)])
def test_an_error_names_the_key_and_not_its_hash(limit):
    limits = KeyLimiter()
    limits.acquire("27fb1a0cd3f7a2b1", limit, 0.0)
    for count, error in ((1, Overloaded), (2, InvalidRequest)):
        with pytest.raises(error, match="API key 'ci'") as caught:
            limits.acquire("27fb1a0cd3f7a2b1", limit, 0.0, count)
        assert "27fb1a0cd3f7a2b1" not in str(caught.value)


def test_a_queue_that_has_hardly_moved_gives_no_estimate():
    rate = QueueDepartureRate()
    assert rate.expected_wait(0) == 0.0
    rate.observe(0.0, 5)
    rate.observe(1.0, 5)
    assert rate.expected_wait(5) is None
    Admission(100, max_wait=0.1).check(5, 5, 1.0, deadline=1.1)


def test_a_queue_that_stands_still_gives_an_estimate_in_the_end():
    admission = Admission(100)
    for second in range(20):
        admission.departure_rate.observe(float(second), 5)
    with pytest.raises(Overloaded) as caught:
        admission.check(5, 5, 20.0, deadline=1000.0)
    assert caught.value.retry_after == 60.0
    admission.check(0, 0, 20.0, deadline=21.0)


@pytest.mark.parametrize(("at_once", "gap"), [(1, 0.1), (4, 0.4)])
def test_fewer_requests_are_admitted_when_the_queue_moves_in_bursts(at_once, gap):
    """Ten requests leave per second in both cases; an admitted request must be placed within one second."""
    admission, now = Admission(100, max_wait=1.0), 0.0
    while now < 30:
        now += 0.1 * at_once
        admission.departure_rate.observe(now, 20)
        for _ in range(at_once):
            admission.departure_rate.departed()
    assert admission.departure_rate.expected_gap == pytest.approx(gap, rel=0.1)
    most = round((1.0 - gap) * 10)
    admission.check(5, most - 1, now, None)
    with pytest.raises(Overloaded, match="the limit 1 s"):
        admission.check(5, most + 1, now, None)

"""Tests a router under ten times the load that it can serve."""

from overfill.lab.bench.router.overload import measure_overload


def test_under_ten_times_the_load_admitted_requests_are_answered_and_others_get_a_time_to_retry(tiny_pair):
    found = {figure.name: figure.value for figure in measure_overload(tiny_pair, 3.0)}
    assert found["failed"] == 0
    assert found["answered"] > 0
    assert found["refused"] > found["answered"], "most requests are refused"
    assert found["refused_without_retry_time"] == 0

"""A peer that takes part is never too slow; one that stops is noticed within two windows."""

from overfill.kv.pace import PullPace
from overfill.rpc.constants import MIN_PULL_GRACE, MIN_PULL_RATE


def test_nothing_ready_is_never_too_slow():
    pace = PullPace(0.0)
    assert not any(pace.too_slow(t, 0, 0) for t in range(100))


def test_everything_moved_is_never_too_slow():
    pace = PullPace(0.0)
    assert not any(pace.too_slow(t, 1000, 1000) for t in range(100))


def test_a_peer_that_stops_is_noticed_within_two_windows():
    pace = PullPace(0.0)
    assert not pace.too_slow(1.0, 10 * MIN_PULL_RATE, 5 * MIN_PULL_RATE)
    times = [1.0 + 0.5 * i for i in range(1, 10)]
    noticed = next(t for t in times if pace.too_slow(t, 10 * MIN_PULL_RATE, 5 * MIN_PULL_RATE))
    assert noticed <= 1.0 + 2 * MIN_PULL_GRACE


def test_a_small_rest_must_move_too():
    pace = PullPace(0.0)
    assert any(pace.too_slow(0.5 * i, 100, 40) for i in range(10))


def test_a_peer_at_the_minimum_rate_is_left_alone():
    pace = PullPace(0.0)
    ready = 1000 * MIN_PULL_RATE
    assert not any(pace.too_slow(0.5 * i, ready, int(0.5 * i * MIN_PULL_RATE * 1.01)) for i in range(200))


def test_data_that_becomes_ready_late_gets_its_own_window():
    pace = PullPace(0.0)
    assert not pace.too_slow(100.0, 0, 0)
    assert not pace.too_slow(100.5, 500, 0)
    assert not pace.too_slow(102.0, 500, 500)

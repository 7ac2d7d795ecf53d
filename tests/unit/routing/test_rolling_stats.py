"""Tests the statistics of a router's last minute."""

from __future__ import annotations

import pytest

from overfill.routing.rolling_stats import RollingStats, add_up
from overfill.v1 import common_pb2, inference_pb2


def finished(ttft, tokens=11, **parts):
    """Makes an answer; its times are in ms."""
    times = {"ttft_ns": ttft, "total_ns": ttft + 1000} | {f"{name}_ns": value for name, value in parts.items()}
    timing = common_pb2.Timing(**{name: value * 10**6 for name, value in times.items()})
    usage = common_pb2.Usage(completion_tokens=tokens, prompt_tokens=10, cached_tokens=4, peer_tokens=2, disk_tokens=1)
    return inference_pb2.Finished(timing=timing, usage=usage)


def by_name(activity):
    return {entry.name: entry for entry in activity.timing}


def test_percentiles_are_of_answers_that_occurred_and_unattributed_is_what_is_left():
    stats = RollingStats()
    for ttft in range(100, 200):
        stats.answered(finished(ttft, router_queue=20, prefill_compute=60), now=10.0)
    activity = stats.activity(running=3, waiting=4, now=20.0)
    found = by_name(activity)
    assert (activity.running, activity.waiting, activity.answers) == (3, 4, 100)
    assert found["ttft"].p50_seconds == pytest.approx(0.149)
    assert found["ttft"].p99_seconds == pytest.approx(0.198)
    assert found["unattributed"].p50_seconds == pytest.approx(0.069)
    assert found["itl"].p90_seconds == pytest.approx(0.1)
    assert "return_path" not in found, "a time that was not measured is missing, not 0"


def test_answers_are_forgotten_after_a_minute():
    stats = RollingStats()
    stats.answered(finished(100), now=0.0)
    stats.answered(finished(200), now=50.0)
    assert stats.activity(0, 0, now=59.0).answers == 2
    later = stats.activity(0, 0, now=61.0)
    assert later.answers == 1
    assert by_name(later)["ttft"].p50_seconds == pytest.approx(0.2)
    assert list(stats.activity(0, 0, now=200.0).timing) == []


def test_tokens_per_second_are_those_of_the_last_ten():
    stats = RollingStats()
    for second in range(100):
        for _ in range(5):
            stats.tokens(4, now=second + 0.5)
    assert stats.activity(0, 0, now=100.0).tokens_per_second == pytest.approx(20.0)
    assert stats.activity(0, 0, now=105.0).tokens_per_second == pytest.approx(10.0)
    assert stats.activity(0, 0, now=120.0).tokens_per_second == 0


def test_activities_of_several_routers_add_up_as_if_one_router_had_answered_everything():
    one, many = RollingStats(), [RollingStats() for _ in range(3)]
    for index, ttft in enumerate(range(100, 700)):
        answer = finished(ttft, router_queue=20)
        one.answered(answer, now=10.0)
        many[0 if index < 400 else 1].answered(answer, now=10.0)  # uneven, and the third is idle
    many[0].tokens(30, now=9.5)
    many[2].tokens(20, now=9.5)
    activities = []
    for stats in many:
        activity = stats.activity(running=2, waiting=1, now=12.0)
        activity.histograms.extend(stats.histograms(12.0))
        activity.sessions = 2
        activity.busiest_sessions.add(id="a", turns=1)
        activities.append(activity)
    total, exact = add_up(activities), one.activity(6, 3, now=12.0)
    for counts in (total, exact):
        assert (counts.prompt_tokens, counts.cached_tokens, counts.peer_tokens, counts.disk_tokens) == (
            6000, 2400, 1200, 600,
        )  # fmt: skip
    assert (total.sessions, [(one.id, one.turns) for one in total.busiest_sessions]) == (6, [("a", 3)])
    assert (total.running, total.waiting, total.answers) == (6, 3, 600)
    assert total.tokens_per_second == pytest.approx(5.0)
    assert [entry.name for entry in total.timing] == [entry.name for entry in exact.timing]
    for name, times in by_name(exact).items():
        for field in ("p50_seconds", "p90_seconds", "p99_seconds"):
            assert getattr(by_name(total)[name], field) == pytest.approx(getattr(times, field), rel=0.005)

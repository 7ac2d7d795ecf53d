"""Objectives of a whole run: how they are written, and when they are met."""

from __future__ import annotations

import math

import pytest

from overfill.client import Timing
from overfill.errors import InvalidRequest
from overfill.lab.traffic.outcome import Objective, Outcome
from overfill.lab.traffic.run_objectives import judge, of_each_request, parse_objectives

FAST = Outcome(0.0, (0.1, 0.2, 0.3))
SLOW = Outcome(0.0, (2.0, 2.5, 3.0))
FAILED = Outcome(0.0, (), "refused")


def verdicts(objective, outcomes):
    return {one.name: (one.value, one.reached) for one in judge(parse_objectives(objective), outcomes)}


def test_percentiles_are_held_against_seconds_or_milliseconds():
    found = verdicts("ttft_p50=1.05,ttft_p100=1999ms,itl_p0=0.1,tpot_p100=500ms,e2e_p99=3", [FAST, SLOW])
    assert found["ttft_p50"] == (pytest.approx(1.05), True)
    assert found["ttft_p100"] == (2, False)
    assert found["itl_p0"] == (pytest.approx(0.1), True)
    assert found["tpot_p100"] == (pytest.approx(0.5), True)
    assert found["e2e_p99"][1]


def test_no_error_is_allowed_unless_some_are():
    assert verdicts("", [FAST, FAILED]) == {"errors": (1, False)}
    assert verdicts("errors=1", [FAST, FAILED]) == {"errors": (1, True)}
    assert verdicts("errors=49%", [FAST, FAILED]) == {"errors": (50, False)}
    assert verdicts("errors=50%", [FAST, FAILED]) == {"errors": (50, True)}


def test_what_was_not_measured_is_not_met():
    value, met = verdicts("ttft_p95=60,errors=5", [FAILED])["ttft_p95"]
    assert (math.isnan(value), met) == (True, False)
    assert not verdicts("unattributed_p50=100%", [FAST])["unattributed_p50"][1]


def test_unattributed_is_what_no_part_covers_of_what_the_client_saw():
    timing = Timing(ttft=0.45, router_queue=0.1, prefill_compute=0.2)
    answer = Outcome(0.0, (1.0, 2.0), sent=0.6, timing=timing)
    assert answer.unattributed == pytest.approx(0.25)
    assert verdicts("unattributed_p99=25.1%", [answer])["unattributed_p99"][1]
    assert not verdicts("unattributed_p99=0.2", [answer])["unattributed_p99"][1]


def test_the_limits_of_a_run_are_those_of_each_request_without_percentiles():
    objectives = parse_objectives("ttft_p50=1,ttft_p99=2500ms,tpot_p90=0.1,unattributed_p50=5%,errors=1")
    assert of_each_request(objectives) == Objective(ttft=2.5, itl=0.1)


@pytest.mark.parametrize(
    "objective",
    ["ttft=2", "ttft_p101=1", "ttft_p95", "ttft_p95=-1", "ttft_p95=5%", "errors=1.5", "errors=2s", "x_p50=1"],
)
def test_what_is_no_objective_is_told(objective):
    with pytest.raises(InvalidRequest, match="not an objective such as"):
        parse_objectives(objective)


def test_an_objective_may_not_be_there_twice():
    with pytest.raises(InvalidRequest, match="ttft_p95 twice"):
        parse_objectives("ttft_p95=1,ttft_p95=2")

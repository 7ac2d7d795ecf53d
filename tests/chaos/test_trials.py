"""A stack breaks under load: every request is answered right or refused in so many words, and nothing is left behind.

Short forms of ``overfill chaos``, whose full length docs/reliability.md quotes.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from overfill.cli.up_plan import make_plan
from overfill.lab.chaos.report import Report
from overfill.lab.chaos.strikes import FAULTS, PHASES, Strike, matrix
from overfill.lab.chaos.trial import Trial, run_trial
from overfill.pair.reference import TwoStageReference
from overfill.telemetry.progress import silent

SETTINGS = {"dtype": "float32", "kv_memory": "4MiB", "max_model_len": "512", "grace_period": 1, "max_num_seqs": 4}
PROMPTS = [[20 + (7 * i * (seed + 3)) % 470 for i in range(30 + seed)] for seed in range(8)]
MAX_TOKENS = 32


def broken(pair: Path, strikes: list[Strike], **more: object) -> Report:
    """The report of a trial that has passed."""
    plan = make_plan(pair, 2, 2, 2, 0, 1, SETTINGS | {"log_level": "error"})
    trial = Trial(strikes, PROMPTS, requests=40, streams=8, max_tokens=MAX_TOKENS, **more)  # type: ignore[arg-type]
    result = asyncio.run(run_trial(plan, trial, silent))
    report = Report(result, *result.judge(TwoStageReference(pair), MAX_TOKENS, silent), {})
    assert report.passed, {key: value for key, value in report.as_dict().items() if key != "strikes"}
    assert len(result.struck) + len(result.unavailable) >= len(strikes)
    return report


def test_answers_are_right_whatever_befalls_whom(tiny_pair: Path) -> None:
    """One of each kind, but for those that take long, each in another phase."""
    strikes = [
        Strike(0, "kill", "decode", "decode"),
        Strike(1, "corrupt", "prefill", "prefill"),
        Strike(2, "kill", "handoff", "prefill"),
        Strike(3, "clock", "reserving", "decode", seconds=1.0, jump=3000.0),
        Strike(4, "kill", "decode", "router"),
        Strike(5, "loss", "queued", "decode", seconds=1.0),
        Strike(6, "disk", "handoff", "prefill", seconds=1.0),
        Strike(7, "drain", "decode", "decode"),
        Strike(8, "vanish", "handoff", "client"),
        Strike(9, "slow", "decode", "client"),
        Strike(10, "delay", "finishing", "router", seconds=1.0),
        Strike(11, "bandwidth", "prefill", "prefill", seconds=1.0),
    ]
    report = broken(tiny_pair, strikes, abreast=3)
    assert report.result.migrations > 0
    clock = report.cells().get("clock", {}).get("reserving", {"right": 0, "in_phase": 0})
    assert clock["right"] == clock["in_phase"]  # given up in so many words would be no good answer to a clock
    assert len(report.result.ended("vanished")) == 1


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_in_every_phase(tiny_pair: Path, fault: str) -> None:
    strikes = matrix(1, 3, [fault], PHASES)  # type: ignore[list-item]
    report = broken(tiny_pair, strikes, abreast=2, limit=1500.0)
    assert set(report.cells().get(fault, {})) == set(PHASES) or report.result.unavailable == [fault]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_soak_at_a_share_of_what_the_stack_can_do(tiny_pair: Path) -> None:
    from overfill.lab.chaos.strikes import draw

    report = broken(tiny_pair, draw(3, 2.0), share=0.7, seconds=120.0, abreast=2)  # type: ignore[arg-type]
    assert report.result.rate is not None
    assert len(report.result.outcomes) > 60 * report.result.rate

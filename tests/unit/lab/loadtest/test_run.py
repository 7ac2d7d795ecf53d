"""A load test: its warm-up, its end by time, count or ctrl-C, and its report."""

from __future__ import annotations

import asyncio
import json
import signal

import pytest

from overfill.client import Timing
from overfill.lab.loadtest import run
from overfill.lab.loadtest.plan import LoadPlan
from overfill.lab.loadtest.report import MET, MISSED, NOT_MEASURED, conclude
from overfill.lab.traffic.outcome import Outcome, RequestFailed

TIMING = Timing(ttft=0.9, router_queue=0.2, prefill_compute=0.5, total=2.0)


class FakeTarget:
    """A target that answers at once. At request ``interrupted`` the user presses ctrl-C, and no answer comes."""

    def __init__(self, interrupted=None, failure=None):
        self.interrupted, self.failure = interrupted, failure
        self.asked = []

    async def __aenter__(self):
        return self

    async def __aexit__(self, *exc):
        pass

    async def stream(self, prompt, max_tokens, received, tier):
        self.asked.append((len(prompt), max_tokens, tier))
        if self.failure:
            raise RequestFailed(self.failure)
        if len(self.asked) - 2 == self.interrupted:  # after the warm-up
            signal.raise_signal(signal.SIGINT)
            await asyncio.Event().wait()
        await asyncio.sleep(0)
        yield max_tokens


@pytest.fixture
def tested(monkeypatch):
    """Runs a plan on a fake target and returns its outcomes."""

    def runs(target, **options):
        plan = LoadPlan(prompt_tokens=7, output_tokens=3, vocab_size=100, **options)
        monkeypatch.setattr(run, "_target", lambda *_: target)
        return run.run_test(plan, plan.load(), None, None)

    return runs


def test_each_tier_gets_a_short_request_first_which_is_in_no_figure(tested):
    target = FakeTarget()
    outcomes = tested(target, tier=("full", "fast"), requests=3)
    assert target.asked[:2] == [(64, 4, "full"), (64, 4, "fast")]
    assert len(target.asked) == 5
    assert [outcome.tokens for outcome in outcomes] == [3] * 3


def test_a_target_that_fails_at_the_first_request_is_not_measured(tested):
    target = FakeTarget(failure="no such tier")
    with pytest.raises(RequestFailed, match="no such tier"):
        tested(target, requests=3)
    assert len(target.asked) == 1


def test_the_time_ends_a_test(tested):
    outcomes = tested(FakeTarget(), duration=0.2, users=2)
    assert outcomes
    assert all(outcome.ok for outcome in outcomes), "what runs when the time is over is waited for"
    assert outcomes == sorted(outcomes, key=lambda outcome: outcome.due)


def test_ctrl_c_ends_a_test_and_what_has_not_ended_has_failed(tested):
    arrivals = tested(FakeTarget(interrupted=1), rate=100.0, requests=4)
    assert [outcome.error for outcome in arrivals] == [None, "the run was interrupted", "never sent", "never sent"]
    users = tested(FakeTarget(interrupted=1), users=1)
    assert [outcome.error for outcome in users] == [None, "the run was interrupted"]


@pytest.mark.parametrize(("objective", "code"), [("ttft_p99=2", MET), ("ttft_p99=0.5", MISSED)])
def test_the_end_prints_judges_and_writes_a_page_that_needs_nothing_else(objective, code, tmp_path, capsys):
    page, records = tmp_path / "report.html", tmp_path / "records.jsonl"
    plan = LoadPlan(objective=objective, report=page, records=records, tier=("full",))
    outcomes = [
        Outcome(i, (i + 1.0, i + 1.5), sent=float(i), timing=TIMING, tier="full", written_by="cheap") for i in range(20)
    ]
    assert conclude(plan, outcomes) == code
    out, err = capsys.readouterr()
    lines = [line.replace("│", "").split() for line in out.splitlines()]
    assert ["ttft", "1", "s", "1", "1"] in lines
    assert ["attainment", "1" if code == MET else "0", "of", "requests"] in lines
    assert ["written", "by", "cheap", "20", "answers"] in lines
    assert ["ttft_p99", "1", "s", "≤", "2"] in lines or code == MISSED
    assert ("loadtest: missed: ttft_p99: 1 s (at most 0.5 s)" in err) == (code == MISSED)
    html = page.read_text()
    assert html.count("<svg") == 1
    for shown in ("attainment", "Latencies over time", "Parts of the time to first token", "prefill compute"):
        assert shown in html
    assert not [mark for mark in ("<script", "<link", "<img", " src=") if mark in html]
    assert str(tmp_path) not in html, "only names of files"
    told = [json.loads(line) for line in records.read_text().splitlines()]
    assert len(told) == 20
    assert told[1]["times"] == [2.0, 2.5]
    assert told[1]["timing"]["prefill_compute"] == 0.5


def test_failures_are_counted_and_told(tmp_path, capsys):
    page = tmp_path / "report.html"
    outcomes = [Outcome(0.0, (1.0,), sent=0.0), Outcome(0.5, (), "<refused>", sent=0.5), Outcome(0.6, (), "never sent")]
    assert conclude(LoadPlan(report=page), outcomes) == MISSED
    out, err = capsys.readouterr()
    assert ["failed", "2", "requests"] in [line.replace("│", "").split() for line in out.splitlines()]
    assert "2 requests failed; the first: <refused>" in err
    assert "missed: errors: 2 (at most 0)" in err
    assert "&lt;refused&gt;" in page.read_text()


def test_a_report_of_failures_alone_has_no_plots(tmp_path, capsys):
    page = tmp_path / "report.html"
    assert conclude(LoadPlan(report=page, objective="ttft_p95=1"), [Outcome(0.0, (), "refused")]) == MISSED
    assert "missed: ttft_p95: not measured (at most 1 s)" in capsys.readouterr().err
    assert "<svg" not in page.read_text()


def test_nothing_measured_is_told_apart_from_missed(capsys):
    assert conclude(LoadPlan(), []) == NOT_MEASURED
    assert "nothing was measured: no request was sent" in capsys.readouterr().err

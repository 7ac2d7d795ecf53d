"""A load test: timed requests, records between processes, its end, and its report."""

from __future__ import annotations

import io
import itertools
import json

import pytest

from overfill.client import Timing
from overfill.lab.loadtest.measure import Reported, from_record, measure, relative_to_start, to_record
from overfill.lab.loadtest.plan import LoadPlan
from overfill.lab.loadtest.run import LoadTestRun
from overfill.lab.loadtest.verdict import LoadTestStatus, conclude
from overfill.lab.traffic.outcome import Outcome, RequestFailed

TIMING = Timing(ttft=0.9, router_queue=0.2, prefill_compute=0.5, total=2.0)


class Canned:
    """A transport that reports ``counts`` tokens in turn and then fails if ``failure`` is set."""

    def __init__(self, counts, failure=None):
        self.counts = counts
        self.failure = failure

    def ask(self, prompt, max_tokens, timeout, on_tokens, tier):
        for count in self.counts:
            on_tokens(count)
        if self.failure:
            raise RequestFailed(self.failure)
        return Reported(TIMING, tier)

    def close(self):
        pass


def asked(transport, due=None, tier=""):
    ticks = itertools.count(10)
    return measure(transport, [1], 4, 60.0, due, lambda: float(next(ticks)), tier)


def test_tokens_of_one_message_came_together():
    outcome = asked(Canned([1, 3]))
    assert (outcome.due, outcome.sent, outcome.times) == (10, 10, (11, 12, 12))
    assert outcome.timing == TIMING
    assert asked(Canned([1]), due=7.0).ttft == 4, "a late client does not flatter the server"


def test_a_server_s_own_count_at_the_end_counts():
    outcome = asked(Canned([1, 2, 3, 2]))
    assert (outcome.times, outcome.tokens, outcome.itl) == ((11, 12, 13), 2, 2.0)


def test_a_failed_request_says_why():
    assert asked(Canned([1], "the stream broke off")).error == "the stream broke off"
    assert asked(Canned([])).error == "no token arrived"


def test_outcomes_survive_the_way_to_the_master():
    master, worker = LoadTestRun(LoadPlan(requests=2)), LoadTestRun(LoadPlan(requests=2))
    worker.outcomes = [asked(Canned([1, 2]), tier="full"), asked(Canned([], "refused"))]
    assert (worker.outcomes[0].tier, worker.outcomes[0].written_by) == ("full", "full")
    sent, data = list(worker.outcomes), {}
    worker.report(data)
    assert worker.outcomes == []
    master.collect(json.loads(json.dumps(data)))
    assert master.outcomes == sent
    assert from_record(to_record(sent[0])) == sent[0]
    assert master.is_over(0.0)


def test_a_process_that_never_reports_is_not_waited_for_and_counts_as_failed():
    run = LoadTestRun(LoadPlan(rate=10.0, requests=5, timeout=3.0))
    run.outcomes = [asked(Canned([1]))]
    assert not run.is_over(1.0)
    assert run.is_over(1000.0)
    assert [outcome.ok for outcome in run.all_outcomes()] == [True] + [False] * 4


def test_times_count_from_the_first_request():
    later, first = Outcome(105.0, (106.0,), sent=105.5), Outcome(100.0, (), "refused")
    assert relative_to_start([later, first]) == [Outcome(0.0, (), "refused"), Outcome(5.0, (6.0,), sent=5.5)]


@pytest.mark.parametrize(
    ("objective", "result"), [("ttft_p99=2", LoadTestStatus.MET), ("ttft_p99=0.5", LoadTestStatus.MISSED)]
)
def test_the_end_prints_judges_and_writes_a_page_that_needs_nothing_else(objective, result, tmp_path):
    page, records = tmp_path / "report.html", tmp_path / "records.jsonl"
    run = LoadTestRun(LoadPlan(objective=objective, report=str(page), records=str(records)))
    run.outcomes = [Outcome(i, (i + 1.0, i + 1.5), sent=float(i), timing=TIMING) for i in range(20)]
    out, err = io.StringIO(), io.StringIO()
    assert conclude(run, out, err) is result
    assert "1,000.0" in out.getvalue()
    assert ("ttft_p99: 1000.0 ms (at most 500.0 ms)" in err.getvalue()) == (result is LoadTestStatus.MISSED)
    html = page.read_text()
    assert html.count("<svg") == 2
    assert "unattributed" in html
    assert not [mark for mark in ("<script", "<link", "<img", " src=") if mark in html]
    assert len(records.read_text().splitlines()) == 20


def test_nothing_measured_is_told_apart_from_missed():
    run = LoadTestRun(LoadPlan())
    run.failure = "the server does not answer"
    err = io.StringIO()
    assert conclude(run, io.StringIO(), err) is LoadTestStatus.NOT_MEASURED
    assert "the server does not answer" in err.getvalue()

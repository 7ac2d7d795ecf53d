"""Ends a load test: prints its table, writes report and records, and checks the objectives."""

from __future__ import annotations

import enum
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

from rich.console import Console
from rich.table import Table

from overfill.lab.loadtest import tables
from overfill.lab.loadtest.measure import relative_to_start, to_record
from overfill.lab.loadtest.run import LoadTestRun
from overfill.lab.traffic.run_objectives import ObjectiveVerdict

_WIDTH = 120


class LoadTestStatus(enum.Enum):
    MET = "every objective is met"
    MISSED = "an objective is missed"
    NOT_MEASURED = "nothing was measured"


def conclude(run: LoadTestRun, out: TextIO, err: TextIO) -> LoadTestStatus:
    """Prints tables to ``out`` and missed objectives to ``err``; writes the files that the plan names."""
    if run.failure is not None or not run.outcomes:
        print(f"\nloadtest: nothing was measured: {run.failure or 'no request was sent'}", file=err)
        return LoadTestStatus.NOT_MEASURED
    outcomes = relative_to_start(run.all_outcomes())
    verdicts = run.plan.objectives.judge(outcomes)
    if err.isatty():
        print(file=err)  # below the progress line
    console = Console(file=out, highlight=False, width=None if out.isatty() else _WIDTH)
    console.print(_table(tables.FIGURE_HEAD, tables.figure_rows(outcomes)))
    if by_tier := tables.tier_rows(outcomes, run.plan.objectives.of_each_request()):
        console.print(_table(tables.TIER_HEAD, by_tier, left=("tier", "written by"), gap=1))
    objectives = ("objective", "measured", "at most", "")
    console.print(_table(objectives, [_verdict_row(verdict) for verdict in verdicts], left=objectives))
    errors = [outcome.error for outcome in outcomes if not outcome.ok]
    if errors:
        print(f"loadtest: {len(errors)} requests failed; the first: {errors[0]}", file=err)
    for verdict in verdicts:
        if not verdict.met:
            print(f"loadtest: missed: {verdict}", file=err)
    if run.plan.records is not None:
        lines = (json.dumps(to_record(outcome)) + "\n" for outcome in outcomes)
        Path(run.plan.records).write_text("".join(lines))
    if run.plan.report is not None:
        from overfill.lab.loadtest.html_report import write_report

        write_report(Path(run.plan.report), run.plan, outcomes, verdicts)
        print(f"loadtest: the report is {run.plan.report}", file=err)
    return LoadTestStatus.MET if all(verdict.met for verdict in verdicts) else LoadTestStatus.MISSED


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], left: Sequence[str] = ("",), gap: int = 2) -> Table:
    table = Table(box=None, padding=(0, gap))
    for column in head:
        table.add_column(column, justify="left" if column in left else "right")
    for row in rows:
        table.add_row(*row)
    return table


def _verdict_row(verdict: ObjectiveVerdict) -> tuple[str, ...]:
    threshold = verdict.threshold
    status = "met" if verdict.met else "MISSED"
    return threshold.name, threshold.text(verdict.measured), threshold.text(threshold.maximum), status

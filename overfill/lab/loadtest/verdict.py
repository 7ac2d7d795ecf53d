"""Ends a load test: prints its table, writes report and records, and checks the objectives."""

from __future__ import annotations

import enum
import json
from pathlib import Path
from typing import TextIO

import numpy as np
from rich.console import Console
from rich.table import Table

from overfill.lab.loadtest import tiers
from overfill.lab.loadtest.measure import relative_to_start, to_record
from overfill.lab.loadtest.run import LoadTestRun
from overfill.lab.traffic.outcome import PERCENTILES, Outcome, figures, samples
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
    console.print(summary(outcomes))
    if by_tier := tiers.rows(outcomes, run.plan.objectives.of_each_request()):
        console.print(_tier_table(by_tier))
    console.print(_verdict_table(verdicts))
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


def summary(outcomes: list[Outcome]) -> Table:
    """Returns a table with a row per latency, and rates below."""
    found = {figure.name: figure for figure in figures(outcomes, None)}
    table = Table(box=None, padding=(0, 2))
    table.add_column("")
    for percentile in PERCENTILES:
        table.add_column(f"p{percentile}", justify="right")
    for name, label in (("ttft", "time to first token, ms"), ("itl", "between tokens, ms"), ("e2e", "end to end, ms")):
        table.add_row(label, *[_cell(found[f"{name}_p{p}"].value, 1e3) for p in PERCENTILES])
    shares = samples(outcomes, "unattributed")
    if shares:
        table.add_row("TTFT unattributed, %", *[_cell(float(np.percentile(shares, p)), 1e2) for p in PERCENTILES])
    for name in ("requests", "output_tokens"):
        table.add_row(f"{name.replace('_', ' ')} per second", _cell(found[name].value, 1.0))
    table.add_row("answered", f"{sum(o.ok for o in outcomes)} of {len(outcomes)}")
    return table


def _tier_table(rows: list[tuple[str, ...]]) -> Table:
    table = Table(box=None, padding=(0, 1))
    for column in tiers.HEAD:
        table.add_column(column, justify="left" if column in ("tier", "written by") else "right")
    for row in rows:
        table.add_row(*row)
    return table


def _verdict_table(verdicts: list[ObjectiveVerdict]) -> Table:
    table = Table(box=None, padding=(0, 2))
    for column in ("objective", "measured", "at most", ""):
        table.add_column(column)
    for verdict in verdicts:
        threshold = verdict.threshold
        status = "met" if verdict.met else "MISSED"
        table.add_row(threshold.name, threshold.text(verdict.measured), threshold.text(threshold.maximum), status)
    return table


def _cell(value: float | None, factor: float) -> str:
    return "–" if value is None else f"{factor * value:,.1f}"

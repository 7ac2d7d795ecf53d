"""Ends a load test: prints tables and missed objectives, writes the plan's files, and gives the exit code."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import TextIO

from rich.console import Console
from rich.table import Table

from overfill.lab.loadtest.plan import LoadPlan
from overfill.lab.loadtest.tables import ResultTable, result_tables
from overfill.lab.traffic.outcome import Outcome
from overfill.lab.traffic.run_objectives import judge, value_text

MET, MISSED, NOT_MEASURED = 0, 1, 2
"""Exit codes: every objective is met, one is missed, nothing could be measured."""

_WIDTH = 120
_NARROW = 4
"""Number of columns up to which a table has wide gaps."""


def conclude(plan: LoadPlan, outcomes: Sequence[Outcome], out: TextIO, err: TextIO) -> int:
    """Prints tables to ``out`` and missed objectives to ``err``, and writes the plan's files. Returns the exit code."""
    if not outcomes:
        return nothing_measured("no request was sent", err)
    verdicts = judge(plan.objectives, outcomes)
    tables = result_tables(outcomes, verdicts)
    if err.isatty():
        print(file=err)  # below the progress line
    console = Console(file=out, highlight=False, width=None if out.isatty() else _WIDTH)
    for table in tables:
        console.print(_rich(table))
    if errors := [outcome.error or "" for outcome in outcomes if not outcome.ok]:
        print(f"loadtest: {len(errors)} requests failed; the first: {errors[0]}", file=err)
    missed = [verdict for verdict in verdicts if not verdict.reached]
    for one in missed:
        measured, bound = value_text(one.value, one.unit), value_text(one.bound, one.unit)
        print(f"loadtest: missed: {one.name}: {measured} (at most {bound})", file=err)
    if plan.records is not None:
        plan.records.write_text("".join(json.dumps(asdict(outcome)) + "\n" for outcome in outcomes))
    if plan.report is not None:
        from overfill.lab.loadtest.html_report import write_report

        write_report(plan.report, plan, outcomes, tables, passed=not missed)
        print(f"loadtest: the report is {plan.report}", file=err)
    return MISSED if missed else MET


def nothing_measured(reason: str, err: TextIO) -> int:
    print(f"\nloadtest: nothing was measured: {reason}", file=err)
    return NOT_MEASURED


def _rich(table: ResultTable) -> Table:
    made = Table(box=None, padding=(0, 1 if len(table.head) > _NARROW else 2))
    for column, title in enumerate(table.head):
        cells = [row[column] for row in table.rows if column < len(row)]
        made.add_column(title, justify="right" if all(cell[:1].isdigit() or cell == "–" for cell in cells) else "left")
    for row in table.rows:
        made.add_row(*row)
    return made

"""Reports a load test: tables, missed objectives, records, and the exit code."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TextIO

import numpy as np
from rich.console import Console
from rich.table import Table

from overfill.lab.loadtest.plan import LoadPlan
from overfill.lab.measurement import Measurement
from overfill.lab.traffic.outcome import PERCENTILES, Objective, Outcome, figures, samples
from overfill.lab.traffic.run_objectives import judge, of_each_request, value_text

MET, MISSED, NOT_MEASURED = 0, 1, 2
"""Exit codes: every objective is met, one is missed, nothing could be measured."""

_WIDTH = 120


@dataclass(frozen=True, slots=True)
class ResultTable:
    """A table of the results, for the terminal and for the HTML report."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]


def conclude(plan: LoadPlan, outcomes: Sequence[Outcome], out: TextIO, err: TextIO) -> int:
    """Prints tables to ``out`` and missed objectives to ``err``, and writes the plan's files. Returns the exit code."""
    if not outcomes:
        return nothing_measured("no request was sent", err)
    verdicts = judge(plan.objectives, outcomes)
    tables = [_figure_table(outcomes), *_tier_table(outcomes, of_each_request(verdicts)), _objective_table(verdicts)]
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


def _figure_table(outcomes: Sequence[Outcome]) -> ResultTable:
    """A row per latency, then rows of one figure each."""
    found = {figure.name: figure.value for figure in figures(outcomes)}
    labels = {"ttft": "time to first token, ms", "itl": "between tokens, ms", "e2e": "end to end, ms"}
    rows = [(label, *(_cell(found[f"{name}_p{p}"], 1e3) for p in PERCENTILES)) for name, label in labels.items()]
    if shares := samples(outcomes, "unattributed"):
        rows.append(("TTFT unattributed, %", *(_cell(mark, 1e2) for mark in np.percentile(shares, PERCENTILES))))
    rows += [(f"{name.replace('_', ' ')} per second", _cell(found[name])) for name in ("requests", "output_tokens")]
    rows.append(("answered", f"{sum(outcome.ok for outcome in outcomes)} of {len(outcomes)}"))
    return ResultTable("Figures", ("", *(f"p{percentile}" for percentile in PERCENTILES)), rows)


def _tier_table(outcomes: Sequence[Outcome], objective: Objective) -> list[ResultTable]:
    """A row per tier, ordered by name; no table unless requests named tiers.

    Attainment is the share of a tier's requests that were answered within the limits of ``objective``.
    """
    rows = []
    for tier in sorted({outcome.tier for outcome in outcomes} - {""}):
        of_tier = [outcome for outcome in outcomes if outcome.tier == tier]
        found = {figure.name: figure.value for figure in figures(of_tier, objective)}
        writers = Counter(outcome.written_by or "unknown" for outcome in of_tier if outcome.ok)
        rows.append(
            (
                tier,
                str(len(of_tier)),
                str(writers.total()),
                f"{100 * found['attainment']:.1f} %",
                *(_cell(found[name], 1e3) for name in ("ttft_p50", "ttft_p90", "itl_p90")),
                ", ".join(f"{name} {count}" for name, count in sorted(writers.items())) or "–",
            )
        )
    head = ("tier", "requests", "answered", "attainment", "TTFT p50, ms", "p90, ms", "ITL p90, ms", "written by")
    return [ResultTable("Tiers", head, rows)] if rows else []


def _objective_table(verdicts: Sequence[Measurement]) -> ResultTable:
    rows = [
        (
            one.name,
            *(value_text(value, one.unit) for value in (one.value, one.bound)),
            "met" if one.reached else "MISSED",
        )
        for one in verdicts
    ]
    return ResultTable("Objectives", ("objective", "measured", "at most", ""), rows)


def _rich(table: ResultTable) -> Table:
    made = Table(box=None, padding=(0, 1))
    for column, title in enumerate(table.head):
        cells = [row[column] for row in table.rows if column < len(row)]
        made.add_column(title, justify="right" if all(cell[:1].isdigit() or cell == "–" for cell in cells) else "left")
    for row in table.rows:
        made.add_row(*row)
    return made


def _cell(value: float, factor: float = 1.0) -> str:
    return "–" if math.isnan(value) else f"{factor * value:,.1f}"

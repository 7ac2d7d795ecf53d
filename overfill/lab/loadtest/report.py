"""Ends a load test: prints tables and missed objectives, writes the plan's files, and gives the exit code."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace

from overfill.cli.output import console
from overfill.lab.loadtest.plan import LoadPlan
from overfill.lab.measurement import Measurement, measurements_table, value_text
from overfill.lab.traffic.figures import Figure, figures
from overfill.lab.traffic.outcome import Objective, Outcome
from overfill.lab.traffic.run_objectives import judge, of_each_request

MET, MISSED, NOT_MEASURED = 0, 1, 2
"""Exit codes: every objective is met, one is missed, nothing could be measured."""

_PERCENTILES = {"p90": "p90", "p99": "p99"}


def conclude(plan: LoadPlan, outcomes: Sequence[Outcome]) -> int:
    """Prints tables on stdout and missed objectives on stderr, and writes the plan's files. Returns the exit code."""
    if not outcomes:
        return nothing_measured("no request was sent")
    verdicts = judge(plan.objectives, outcomes)
    of_tiers = list(_of_tiers(outcomes, of_each_request(verdicts)))
    shown: list[Sequence[Measurement]] = [figures(outcomes), of_tiers, verdicts]
    tables = [measurements_table(rows, _PERCENTILES) for rows in shown if rows]
    console().print(*tables, sep="\n")
    if errors := [outcome.error or "" for outcome in outcomes if not outcome.ok]:
        print(f"loadtest: {len(errors)} requests failed; the first: {errors[0]}", file=sys.stderr)
    missed = [verdict for verdict in verdicts if not verdict.reached]
    for one in missed:
        measured, bound = value_text(one.value, one.unit), value_text(one.bound, one.unit)
        print(f"loadtest: missed: {one.name}: {measured} (at most {bound})", file=sys.stderr)
    if plan.records is not None:
        plan.records.write_text("".join(json.dumps(asdict(outcome)) + "\n" for outcome in outcomes))
    if plan.report is not None:
        from overfill.lab.loadtest.html_report import write_report

        write_report(plan.report, plan, outcomes, tables, passed=not missed)
        print(f"loadtest: the report is {plan.report}", file=sys.stderr)
    return MISSED if missed else MET


def nothing_measured(reason: str) -> int:
    print(f"loadtest: nothing was measured: {reason}", file=sys.stderr)
    return NOT_MEASURED


def _of_tiers(outcomes: Sequence[Outcome], objective: Objective) -> Iterator[Figure]:
    """Yields the figures of each tier that requests named, and the number of answers by the tier that wrote them."""
    for tier in sorted({outcome.tier for outcome in outcomes} - {""}):
        of_tier = [outcome for outcome in outcomes if outcome.tier == tier]
        writers = Counter(outcome.written_by or "unknown" for outcome in of_tier if outcome.ok)
        written = (Figure(f"written by {name}", count, "answers") for name, count in sorted(writers.items()))
        for figure in (*figures(of_tier, objective), *written):
            yield replace(figure, of={"tier": tier})

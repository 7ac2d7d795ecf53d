"""Tables of a load test's results, for the terminal and for the HTML report."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from overfill.lab.measurement import Measurement
from overfill.lab.traffic.outcome import PERCENTILES, Objective, Outcome, figures, samples
from overfill.lab.traffic.run_objectives import of_each_request, value_text


@dataclass(frozen=True, slots=True)
class ResultTable:
    """A table; a row may be shorter than the head."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]


def result_tables(outcomes: Sequence[Outcome], verdicts: Sequence[Measurement]) -> list[ResultTable]:
    """Returns the tables of figures and objectives, and between them that of tiers if requests named some."""
    return [_figure_table(outcomes), *_tier_table(outcomes, of_each_request(verdicts)), _objective_table(verdicts)]


def _figure_table(outcomes: Sequence[Outcome]) -> ResultTable:
    """A row per latency, then rows of one figure each."""
    found = figures(outcomes)
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
        found = figures(of_tier, objective)
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


def _cell(value: float, factor: float = 1.0) -> str:
    return "–" if math.isnan(value) else f"{factor * value:,.1f}"

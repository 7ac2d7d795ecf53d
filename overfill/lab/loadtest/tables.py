"""Rows of a load test's tables, for the terminal and for the report."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from overfill.lab.traffic.outcome import PERCENTILES, Objective, Outcome, figures, samples

FIGURE_HEAD = ("", *(f"p{percentile}" for percentile in PERCENTILES))
"""Heads of the columns of ``figure_rows``."""

TIER_HEAD = ("tier", "requests", "answered", "attainment", "TTFT p50, ms", "p90, ms", "ITL p90, ms", "written by")
"""Heads of the columns of ``tier_rows``."""


def figure_rows(outcomes: Sequence[Outcome]) -> list[tuple[str, ...]]:
    """Returns a row per latency, then rows of one figure each."""
    found = {figure.name: figure.value for figure in figures(outcomes, None)}
    labels = {"ttft": "time to first token, ms", "itl": "between tokens, ms", "e2e": "end to end, ms"}
    rows = [(label, *(_cell(found[f"{name}_p{p}"], 1e3) for p in PERCENTILES)) for name, label in labels.items()]
    if shares := samples(outcomes, "unattributed"):
        marks = map(float, np.percentile(shares, PERCENTILES))
        rows.append(("TTFT unattributed, %", *(_cell(mark, 1e2) for mark in marks)))
    rows += [(f"{name.replace('_', ' ')} per second", _cell(found[name])) for name in ("requests", "output_tokens")]
    rows.append(("answered", f"{sum(outcome.ok for outcome in outcomes)} of {len(outcomes)}"))
    return rows


def tier_rows(outcomes: Sequence[Outcome], objective: Objective) -> list[tuple[str, ...]]:
    """Returns a row per tier, ordered by name; none unless requests named tiers.

    Attainment is the share of a tier's requests that were answered within the limits of ``objective``.
    """
    made = []
    for tier in sorted({outcome.tier for outcome in outcomes} - {""}):
        of_tier = [outcome for outcome in outcomes if outcome.tier == tier]
        answered = [outcome for outcome in of_tier if outcome.ok]
        found = {figure.name: figure.value for figure in figures(of_tier, objective)}
        writers = Counter(outcome.written_by or "unknown" for outcome in answered)
        attainment = found["attainment"]
        made.append(
            (
                tier,
                str(len(of_tier)),
                str(len(answered)),
                f"{100 * attainment:.1f} %" if attainment is not None else "–",
                *(_cell(found[name], 1e3) for name in ("ttft_p50", "ttft_p90", "itl_p90")),
                ", ".join(f"{name} {count}" for name, count in sorted(writers.items())) or "–",
            )
        )
    return made


def _cell(value: float | None, factor: float = 1.0) -> str:
    return "–" if value is None else f"{factor * value:,.1f}"

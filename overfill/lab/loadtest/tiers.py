"""Results of a load test by the tier that requests named."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from overfill.lab.traffic.outcome import Objective, Outcome, figures

HEAD = ("tier", "requests", "answered", "attainment", "TTFT p50, ms", "p90, ms", "ITL p90, ms", "written by")
"""Heads of the columns of ``rows``."""


def rows(outcomes: Sequence[Outcome], objective: Objective) -> list[tuple[str, ...]]:
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
        latencies = (found[name] for name in ("ttft_p50", "ttft_p90", "itl_p90"))
        made.append(
            (
                tier,
                str(len(of_tier)),
                str(len(answered)),
                f"{100 * attainment:.1f} %" if attainment is not None else "–",
                *("–" if seconds is None else f"{1e3 * seconds:,.1f}" for seconds in latencies),
                ", ".join(f"{name} {count}" for name, count in sorted(writers.items())) or "–",
            )
        )
    return made

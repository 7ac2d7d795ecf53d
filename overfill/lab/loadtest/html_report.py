"""Writes the report of a load test: one self-contained HTML file with tables and plots. Needs no display."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from io import StringIO
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Column, Table

from overfill.client import TTFT_PARTS
from overfill.lab.loadtest.plan import LoadPlan
from overfill.lab.traffic.outcome import PERCENTILES, Outcome, samples
from overfill.version import __version__

_BINS = 40
_MIN_PER_BIN = 5
_TENTHS = 10
"""Number of groups, by time to first token, in the plot of its parts."""
_FAILURES = 20
"""Number of errors that the report lists, the most frequent first."""
_WIDTH = 120
_LATENCIES = {"ttft": "first token", "itl": "between tokens", "e2e": "end to end"}
_DUE = "when the request was to be sent, seconds since the start"
_STYLE = "body{font-family:sans-serif;max-width:62rem;margin:auto}pre{line-height:1.2;overflow-x:auto}svg{width:100%}"


def write_report(
    path: Path, plan: LoadPlan, outcomes: Sequence[Outcome], tables: Iterable[Table], passed: bool
) -> None:
    """Writes the report to ``path``. ``outcomes`` are sorted by due time; times count from the start of the test."""
    late = [1e3 * (outcome.sent - outcome.due) for outcome in outcomes if outcome.sent is not None] or [0.0]
    done = [outcome for outcome in outcomes if outcome.ok]
    text = Console(file=StringIO(), record=True, width=_WIDTH, highlight=False, markup=False, emoji=False)
    text.print(
        _description(plan, outcomes),
        f"The client sent 99 % of the requests within {np.percentile(late, 99):.1f} ms of when due.",
        *tables,
        *_failures(outcomes),
        _options(plan),
        sep="\n",
    )
    path.write_text(
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Load test</title><style>{_STYLE}</style>'
        f"</head><body><h1>Load test: {'every objective met' if passed else 'objectives missed'}</h1>\n"
        f"{text.export_html(code_format='<pre>{code}</pre>', inline_styles=True)}\n{_plots(done) if done else ''}"
        f"<p>overfill {__version__}</p></body></html>\n",
        encoding="utf-8",
    )


def _description(plan: LoadPlan, outcomes: Sequence[Outcome]) -> str:
    source = f"{len(outcomes)} requests" + (f" of {plan.trace.name}" if plan.trace else "")
    pace = "sent when due" if plan.open_loop else f"{plan.kind}, at most {plan.users} users"
    return f"{source}, {pace}, {'OpenAI over HTTP' if plan.http else 'gRPC'}."


def _failures(outcomes: Sequence[Outcome]) -> list[Table]:
    """Returns a table of the most frequent errors; none if no request failed."""
    errors = Counter(outcome.error for outcome in outcomes if outcome.error is not None)
    table = Table("times", Column("error", overflow="fold"))
    for error, count in errors.most_common(_FAILURES):
        table.add_row(str(count), error[:300])
    return [table] if errors else []


def _options(plan: LoadPlan) -> Table:
    """Returns a table of the options that are set. Of a path only the file name, to reveal no folder names."""
    table = Table("option", Column("value", overflow="fold"))
    for name, value in ((field.name, getattr(plan, field.name)) for field in fields(plan)):
        if value:
            shown = value.name if isinstance(value, Path) else ", ".join(value) if name == "tier" else str(value)
            table.add_row(name, shown)
    return table


def _plots(done: Sequence[Outcome]) -> str:
    """Returns an SVG: latencies over time, and parts of the time to first token if the server tells them."""
    timed = [outcome for outcome in done if outcome.ttft_parts]
    rows: Any = [[name, name] for name in _LATENCIES] + ([["over time", "by rank"]] if timed else [])
    figure = Figure(figsize=(10, 3 * len(rows)), layout="constrained")
    axes: dict[str, Any] = figure.subplot_mosaic(rows)
    bins, _ = _over_time(done)
    for name, label in _LATENCIES.items():
        values = {middle: found for middle, part in bins.items() if (found := samples(part, name))}
        for percentile in PERCENTILES:
            heights = [1e3 * np.percentile(found, percentile) for found in values.values()]
            axes[name].plot([*values], heights, marker=".", label=f"p{percentile}")
        axes[name].set(ylabel=f"{label} (ms)", xlim=(0, max(1e-3, done[-1].due)), ylim=(0, None))
        axes[name].grid(alpha=0.3)
    axes["ttft"].set_title("Latencies over time", loc="left")
    axes["ttft"].legend(ncols=3, loc="lower right", bbox_to_anchor=(1, 1), frameon=False)
    axes["e2e"].set_xlabel(_DUE)
    if timed:
        bins, width = _over_time(timed)
        _stack(axes["over time"], bins, 0.9 * width)
        axes["over time"].set(xlabel=_DUE, ylabel="mean (ms)")
        axes["over time"].set_title("Parts of the time to first token", loc="left")
        ranked = sorted(timed, key=lambda outcome: outcome.ttft)
        ends = [len(ranked) * tenth // _TENTHS for tenth in range(_TENTHS + 1)]
        tenths = enumerate(pairwise(ends), 1)
        _stack(axes["by rank"], {tenth: ranked[low:high] for tenth, (low, high) in tenths if low < high}, 0.9)
        axes["by rank"].set(xlabel="tenth of the answers, fastest first")
        labels = axes["by rank"].get_legend_handles_labels()
        figure.legend(*labels, ncols=8, loc="outside lower center", fontsize="small", frameon=False)
    svg = StringIO()
    with mpl.rc_context({"svg.fonttype": "none"}):
        figure.savefig(svg, format="svg")
    return svg.getvalue()[svg.getvalue().index("<svg") :]


def _over_time(done: Sequence[Outcome]) -> tuple[dict[float, list[Outcome]], float]:
    """Divides outcomes, sorted by due time, into parts of equal duration.

    Returns:
        The outcomes of each part that has some, by its middle, and the parts' duration; both times in seconds.
    """
    count = max(1, min(_BINS, len(done) // _MIN_PER_BIN))
    width = max(1e-3, done[-1].due) / count
    parts = groupby(done, lambda outcome: min(count - 1, int(outcome.due / width)))
    return {(index + 0.5) * width: list(part) for index, part in parts}, width


def _stack(axes: Any, groups: Mapping[float, Sequence[Outcome]], width: float) -> None:
    """Draws a bar at the place of each group: the means of the parts of the time to first token."""
    bottom = np.zeros(len(groups))
    for name in (*TTFT_PARTS, "unattributed"):
        heights = [1e3 * np.mean([max(0.0, one.ttft_parts[name]) for one in group]) for group in groups.values()]
        axes.bar([*groups], heights, width, bottom=bottom, label=name.replace("_", " "))
        bottom += heights
    axes.grid(axis="y", alpha=0.3)

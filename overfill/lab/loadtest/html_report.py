"""Writes the report of a load test: one self-contained HTML file with plots. Needs no display."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields
from html import escape
from io import StringIO
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from rich.table import Table

from overfill.client import TTFT_PARTS
from overfill.lab.loadtest.plan import LoadPlan
from overfill.lab.traffic.outcome import PERCENTILES, Outcome, samples
from overfill.version import __version__

mpl.use("Agg")

import matplotlib.pyplot as plt

_BINS = 40
_MIN_PER_BIN = 5
_GROUPS = 10
"""Number of groups, by time to first token, in the plot of its parts."""
_FAILURES = 20
"""Number of errors that the report lists, the most frequent first."""
_COLOURS = ("#4e79a7", "#f28e2b", "#59a14f", "#e15759", "#76b7b2", "#edc948", "#b07aa1", "#9c9c9c")
_DUE = "when the request was to be sent, seconds since the start"
_LINES = {50: "#1b9e77", 90: "#d95f02", 99: "#7570b3"}

_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:62rem;margin:2rem auto;padding:0 1rem;color:#222;background:#fff}
table{border-collapse:collapse;margin:1rem 0}td,th{padding:.25rem .8rem;border-bottom:1px solid #ddd;text-align:left}
svg{width:100%;height:auto}h1{font-size:1.4rem}h2{font-size:1.1rem;margin-top:2rem}
"""


def write_report(
    path: Path, plan: LoadPlan, outcomes: Sequence[Outcome], tables: Mapping[str, Table], passed: bool
) -> None:
    """Writes the report to ``path``. ``outcomes`` are sorted by due time; times count from the start of the test.

    Args:
        tables: by title. The page shows the last one, the objectives, first.
    """
    late = [1e3 * (outcome.sent - outcome.due) for outcome in outcomes if outcome.sent is not None] or [0.0]
    errors = Counter(outcome.error for outcome in outcomes if outcome.error is not None).most_common(_FAILURES)
    found = [
        _table(
            title, [str(column.header) for column in table.columns], zip(*(c.cells for c in table.columns), strict=True)
        )
        for title, table in tables.items()
    ]
    body = [
        f"<h1>Load test: {'every objective met' if passed else 'objectives missed'}</h1>",
        f"<p>{escape(_description(plan, outcomes))}</p>",
        *found[-1:],
        *found[:-1],
        f"<p>The client sent 99 % of the requests within {np.percentile(late, 99):.1f} ms of when due.</p>",
        *_plots([outcome for outcome in outcomes if outcome.ok]),
    ]
    if errors:
        body.append(_table("Failures", ("times", "error"), ((count, error[:300]) for error, count in errors)))
    body.append(_table("Options", ("option", "value"), _options(plan)))
    path.write_text(
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Load test</title>'
        f"<style>{_STYLE}</style></head><body>{''.join(body)}<p>overfill {__version__}</p></body></html>\n",
        encoding="utf-8",
    )


def _description(plan: LoadPlan, outcomes: Sequence[Outcome]) -> str:
    source = f"{len(outcomes)} requests" + (f" of {plan.trace.name}" if plan.trace else "")
    pace = "sent when due" if plan.open_loop else f"{plan.kind}, at most {plan.users} users"
    return f"{source}, {pace}, {'OpenAI over HTTP' if plan.http else 'gRPC'}."


def _options(plan: LoadPlan) -> list[tuple[str, str]]:
    """Returns the options that are set. Of a path only the file name, to reveal no folder names."""
    values = ((field.name, getattr(plan, field.name)) for field in fields(plan))
    return [
        (name, value.name if isinstance(value, Path) else ", ".join(value) if name == "tier" else str(value))
        for name, value in values
        if value
    ]


def _table(title: str, head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    heads = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in head)
    cells = "".join(f"<tr>{''.join(f'<td>{escape(str(cell))}</td>' for cell in row)}</tr>" for row in rows)
    return f"<h2>{title}</h2><table><thead><tr>{heads}</tr></thead><tbody>{cells}</tbody></table>"


def _plots(done: Sequence[Outcome]) -> list[str]:
    plots = ["<h2>Latencies over time</h2>", _svg(lambda: _over_time(done))] if done else []
    if timed := [outcome for outcome in done if outcome.ttft_parts]:
        plots += [
            "<h2>Parts of the time to first token</h2>",
            "<p>Left: means over time. Right: means per tenth of the answers, from the fastest to the slowest. "
            "Time that no part of the server covers is unattributed: network and client.</p>",
            _svg(lambda: _parts(timed)),
        ]
    return plots


def _over_time(done: Sequence[Outcome]) -> Any:
    figure, rows = plt.subplots(3, 1, figsize=(10, 8), sharex=True)
    bins = _binned(done)
    for axes, name, label in zip(
        rows, ("ttft", "itl", "e2e"), ("first token", "between tokens", "end to end"), strict=True
    ):
        for percentile in PERCENTILES:
            points = [
                (middle, 1e3 * np.percentile(values, percentile))
                for middle, _, of_bin in bins
                if (values := samples(of_bin, name))
            ]
            if points:
                axes.plot(*zip(*points, strict=True), color=_LINES[percentile], marker=".", label=f"p{percentile}")
        axes.set(ylabel=f"{label} (ms)", ylim=(0, None))
        axes.grid(alpha=0.3)
    # Above the axes, because the highest points are often the last ones.
    rows[0].legend(ncols=3, loc="lower right", bbox_to_anchor=(1, 1), frameon=False)
    rows[-1].set_xlabel(_DUE)
    return figure


def _parts(timed: Sequence[Outcome]) -> Any:
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.2), sharey=False)
    middles, widths, of_bins = zip(*_binned(timed), strict=True)
    _stack(left, middles, of_bins, max(1e-3, 0.9 * widths[0]))
    left.set(xlabel=_DUE, ylabel="time to first token (ms)")
    ranked = sorted(timed, key=lambda outcome: outcome.ttft)
    groups = [list(group) for group in np.array_split(np.array(ranked, dtype=object), _GROUPS) if len(group)]
    _stack(right, range(1, len(groups) + 1), groups, 0.9)
    right.set(xlabel="tenth of the answers, fastest first", xticks=range(1, len(groups) + 1))
    handles = right.get_legend_handles_labels()
    figure.legend(*handles, ncols=len(_COLOURS), loc="upper center", fontsize="small", frameon=False)
    return figure


def _stack(axes: Any, places: Sequence[float], groups: Sequence[Sequence[Outcome]], width: float) -> None:
    bottom = np.zeros(len(groups))
    for name, colour in zip((*TTFT_PARTS, "unattributed"), _COLOURS, strict=True):
        heights = np.array(
            [1e3 * np.mean([max(0.0, outcome.ttft_parts[name]) for outcome in group]) for group in groups]
        )
        axes.bar(places, heights, width, bottom=bottom, color=colour, label=name.replace("_", " "))
        bottom += heights
    axes.grid(axis="y", alpha=0.3)


def _binned(done: Sequence[Outcome]) -> list[tuple[float, float, list[Outcome]]]:
    """Divides outcomes by due time. Returns the middle, the width and the outcomes of each part that has some."""
    count = max(1, min(_BINS, len(done) // _MIN_PER_BIN))
    edges = np.linspace(0.0, max(1e-3, *(outcome.due for outcome in done)), count + 1)
    places = np.clip(np.searchsorted(edges, [outcome.due for outcome in done], side="right") - 1, 0, count - 1)
    parts = [[one for one, place in zip(done, places, strict=True) if place == part] for part in range(count)]
    bins = zip(pairwise(map(float, edges)), parts, strict=True)
    return [((low + high) / 2, high - low, part) for (low, high), part in bins if part]


def _svg(draw: Callable[[], Any]) -> str:
    with mpl.rc_context({"svg.fonttype": "none", "font.family": "sans-serif", "svg.hashsalt": "overfill"}):
        figure = draw()
        figure.tight_layout()
        text = StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None})
        plt.close(figure)
    return text.getvalue()[text.getvalue().index("<svg") :]

"""Writes the report of a load test: one self-contained HTML file with plots. Needs no display."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import Field, fields
from html import escape
from io import StringIO
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np

from overfill.client import TTFT_PARTS
from overfill.lab.loadtest import tables
from overfill.lab.loadtest.plan import LoadPlan
from overfill.lab.traffic.outcome import PERCENTILES, Outcome, samples
from overfill.lab.traffic.run_objectives import ObjectiveVerdict
from overfill.version import __version__

mpl.use("Agg")

import matplotlib.pyplot as plt

_BINS = 40
_MIN_PER_BIN = 5
_GROUPS = 10
"""Number of groups, by time to first token, in the plot of its parts."""
_COLOURS = ("#4e79a7", "#f28e2b", "#59a14f", "#e15759", "#76b7b2", "#edc948", "#b07aa1", "#9c9c9c")
_DUE = "when the request was to be sent, seconds since the start"
_LINES = {50: "#1b9e77", 90: "#d95f02", 99: "#7570b3"}

_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:62rem;margin:2rem auto;padding:0 1rem;color:#222;background:#fff}
table{border-collapse:collapse;margin:1rem 0}td,th{padding:.25rem .8rem;border-bottom:1px solid #ddd;text-align:left}
.met{color:#1a7f37}.missed{color:#b3261e;font-weight:600}
svg{width:100%;height:auto}h1{font-size:1.4rem}h2{font-size:1.1rem;margin-top:2rem}
"""


def write_report(path: Path, plan: LoadPlan, outcomes: Sequence[Outcome], verdicts: Sequence[ObjectiveVerdict]) -> None:
    """Writes the report to ``path``. ``outcomes`` are sorted by due time; times count from the start of the test."""
    passed = all(verdict.met for verdict in verdicts)
    body = [
        f"<h1>Load test: {'every objective met' if passed else 'objectives missed'}</h1>",
        f"<p>{escape(_description(plan, outcomes))}</p>",
        "<h2>Objectives</h2>",
        _table(("objective", "measured", "at most", ""), [_verdict_row(verdict) for verdict in verdicts]),
        "<h2>Figures</h2>",
        _table(tables.FIGURE_HEAD, tables.figure_rows(outcomes)),
        _lag(outcomes),
        _tiers(plan, outcomes),
        *_plots(outcomes),
        _failures(outcomes),
        "<h2>Options</h2>",
        _table(("option", "value"), [(f.name, escape(text)) for f in fields(plan) if (text := _option(plan, f))]),
    ]
    path.write_text(
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Load test</title>'
        f"<style>{_STYLE}</style></head><body>{''.join(body)}<p>overfill {__version__}</p></body></html>\n",
        encoding="utf-8",
    )


def _description(plan: LoadPlan, outcomes: Sequence[Outcome]) -> str:
    source = f"{len(outcomes)} requests" + (f" of {Path(plan.trace).name}" if plan.trace else "")
    pace = "sent when due" if plan.open_loop else f"{plan.kind}, at most {plan.users} users"
    protocol = "OpenAI over HTTP" if plan.http else "gRPC"
    return f"{source}, {pace}, {protocol}."


def _plots(outcomes: Sequence[Outcome]) -> list[str]:
    done = [outcome for outcome in outcomes if outcome.ok]
    if not done:
        return []
    timed = [outcome for outcome in done if outcome.timing is not None and outcome.timing.ttft is not None]
    plots = ["<h2>Latencies over time</h2>", _svg(lambda: _over_time(done))]
    if timed:
        plots += [
            "<h2>Parts of the time to first token</h2>",
            "<p>Left: means over time. Right: means per tenth of the answers, from the fastest to the slowest. "
            "Time that no part of the server covers is unattributed: network and client.</p>",
            _svg(lambda: _parts(timed)),
        ]
    return plots


def _over_time(done: Sequence[Outcome]) -> Any:
    figure, rows = plt.subplots(3, 1, figsize=(10, 8), sharex=True)
    edges = _edges(done)
    for axes, (name, label) in zip(
        rows, (("ttft", "first token"), ("itl", "between tokens"), ("e2e", "end to end")), strict=True
    ):
        bins = _binned(done, edges)
        for percentile in PERCENTILES:
            points = [
                (0.5 * (low + high), 1e3 * np.percentile(values, percentile))
                for low, high, of_bin in bins
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
    bins = [(low, high, of_bin) for low, high, of_bin in _binned(timed, _edges(timed)) if of_bin]
    places = [0.5 * (low + high) for low, high, _ in bins]
    width = max(1e-3, 0.9 * (bins[0][1] - bins[0][0]))
    _stack(left, places, [of_bin for _, _, of_bin in bins], width)
    left.set(xlabel=_DUE, ylabel="time to first token (ms)")
    ranked = sorted(timed, key=lambda outcome: outcome.ttft)
    groups = [list(group) for group in np.array_split(np.array(ranked, dtype=object), _GROUPS) if len(group)]
    _stack(right, list(range(1, len(groups) + 1)), groups, 0.9)
    right.set(xlabel="tenth of the answers, fastest first", xticks=range(1, len(groups) + 1))
    handles = right.get_legend_handles_labels()
    figure.legend(*handles, ncols=len(_COLOURS), loc="upper center", fontsize="small", frameon=False)
    return figure


def _stack(axes: Any, places: Sequence[float], groups: Sequence[Sequence[Outcome]], width: float) -> None:
    bottom = np.zeros(len(groups))
    for name, colour in zip((*TTFT_PARTS, "unattributed"), _COLOURS, strict=True):
        heights = np.array([1e3 * np.mean([max(0.0, _part(o, name)) for o in group]) for group in groups])
        axes.bar(places, heights, width, bottom=bottom, color=colour, label=name.replace("_", " "))
        bottom += heights
    axes.grid(axis="y", alpha=0.3)


def _part(outcome: Outcome, name: str) -> float:
    """Returns the seconds of one part of the time to first token."""
    if name == "unattributed":
        share = outcome.unattributed
        return 0.0 if share is None or outcome.sent is None else share * (outcome.times[0] - outcome.sent)
    return getattr(outcome.timing, name) or 0.0


def _edges(done: Sequence[Outcome]) -> list[float]:
    count = max(1, min(_BINS, len(done) // _MIN_PER_BIN))
    last = max(outcome.due for outcome in done)
    return [float(edge) for edge in np.linspace(0.0, max(last, 1e-3), count + 1)]


def _binned(done: Sequence[Outcome], edges: Sequence[float]) -> list[tuple[float, float, list[Outcome]]]:
    places = np.clip(np.searchsorted(edges, [outcome.due for outcome in done], side="right") - 1, 0, len(edges) - 2)
    found: list[tuple[float, float, list[Outcome]]] = [(low, high, []) for low, high in pairwise(edges)]
    for place, outcome in zip(places, done, strict=True):
        found[place][2].append(outcome)
    return found


def _svg(draw: Callable[[], Any]) -> str:
    with mpl.rc_context({"svg.fonttype": "none", "font.family": "sans-serif", "svg.hashsalt": "overfill"}):
        figure = draw()
        figure.tight_layout()
        text = StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None})
        plt.close(figure)
    return text.getvalue()[text.getvalue().index("<svg") :]


def _lag(outcomes: Sequence[Outcome]) -> str:
    late = [outcome.sent - outcome.due for outcome in outcomes if outcome.sent is not None]
    if not late:
        return ""
    return f"<p>The client sent 99 % of the requests within {1e3 * np.percentile(late, 99):.1f} ms of when due.</p>"


def _tiers(plan: LoadPlan, outcomes: Sequence[Outcome]) -> str:
    rows = tables.tier_rows(outcomes, plan.objectives.of_each_request())
    return "<h2>Tiers</h2>" + _table(tables.TIER_HEAD, rows) if rows else ""


def _failures(outcomes: Sequence[Outcome]) -> str:
    counts: dict[str, int] = {}
    for outcome in outcomes:
        if not outcome.ok:
            counts[outcome.error or "no token arrived"] = counts.get(outcome.error or "no token arrived", 0) + 1
    if not counts:
        return ""
    most = sorted(counts.items(), key=lambda item: -item[1])[:20]
    return "<h2>Failures</h2>" + _table(("times", "error"), [(str(n), escape(e[:300])) for e, n in most])


def _verdict_row(verdict: ObjectiveVerdict) -> Sequence[str]:
    status = '<span class="met">met</span>' if verdict.met else '<span class="missed">missed</span>'
    threshold = verdict.threshold
    return threshold.name, threshold.text(verdict.measured), threshold.text(threshold.maximum), status


def _option(plan: LoadPlan, f: Field[Any]) -> str:
    """Formats an option's value; empty if not set. Of a path only the file name, to reveal no folder names."""
    value = getattr(plan, f.name)
    if not value:
        return ""
    return Path(value).name if f.metadata["kind"] is Path else str(value)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns an HTML table. Cells are HTML already."""
    top = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"

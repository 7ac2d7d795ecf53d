"""Draws the plots of evaluations as PNG files. Needs no display."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.lines import Line2D

from overfill.making.evaluate.costs import PRECISIONS
from overfill.making.evaluate.token_metrics import Metric

if TYPE_CHECKING:
    from overfill.making.evaluate.compare import TradeoffPoint

_COLOURS = ("#1b9e77", "#d95f02", "#7570b3", "#e7298a", "#66a61e", "#e6ab02", "#a6761d", "#666666")
_MARKERS = "Dos^vX*P"
_Measure: TypeAlias = "Callable[[TradeoffPoint], float]"


def save_drift(path: Path, title: str, panels: Mapping[str, Mapping[str, Metric]]) -> None:
    """Draws metrics over the position in the answer: a panel per key of ``panels``, a line per variant.

    A key is its panel's y label. Each point stands at the geometric mean of its bucket's ends, position 0 at 0.5. Bars
    are one standard error.
    """
    figure, row = plt.subplots(1, len(panels), figsize=(5.5 * len(panels), 4.2), squeeze=False)
    for axes, (label, lines) in zip(row[0], panels.items(), strict=True):
        for colour, (name, metric) in zip(_COLOURS, lines.items(), strict=False):
            buckets = metric.by_position
            axes.errorbar(
                [(max(b.first, 0.5) * max(b.last, 0.5)) ** 0.5 for b in buckets],
                [b.estimate.mean for b in buckets],
                [b.estimate.standard_error for b in buckets],
                color=colour,
                marker="o",
                markersize=4,
                capsize=2,
                label=name,
            )
        axes.set(xlabel="position in the answer (tokens)", ylabel=label, xscale="log")
        axes.xaxis.set_major_locator(mpl.ticker.LogLocator(base=2, numticks=12))
        axes.xaxis.set_major_formatter(mpl.ticker.FuncFormatter(lambda x, _: f"{x:g}" if x >= 1 else "0"))
        axes.xaxis.set_minor_locator(mpl.ticker.NullLocator())
        axes.grid(alpha=0.3)
        axes.legend()
    figure.suptitle(title)
    _save(figure, path)


def save_tradeoff(path: Path, points: Sequence[TradeoffPoint]) -> None:
    """Draws agreement against decode bytes and FLOPs, and free-running perplexity against bytes.

    The perplexity is that of new text in the decoder's own answers by the full model, divided by that of the full
    model's: 1 is the full model, and larger is worse. Its panel is missing if no answers were written.

    Each precision has one colour and one line, which joins the decoders in order of size. Each decoder has one marker.
    """
    names = list(dict.fromkeys(point.name for point in points))
    markers = dict(zip(names, cycle(_MARKERS), strict=False))
    colours = dict(zip(PRECISIONS, _COLOURS, strict=False))

    def megabytes(point: TradeoffPoint) -> float:
        return point.cost.bytes / 1e6

    def agreement(point: TradeoffPoint) -> float:
        return 100 * point.agreement.mean

    def ratio(point: TradeoffPoint) -> float:
        return math.nan if point.free is None else point.free.new_ratio

    bytes_label, agreement_label = "weights read per token (MB)", "agreement with the full model (%)"
    drawn: list[tuple[str, _Measure, str, _Measure]] = [
        (bytes_label, megabytes, agreement_label, agreement),
        ("operations per token (MFLOP)", lambda p: p.cost.flops / 1e6, agreement_label, agreement),
    ]
    if any(point.free for point in points):
        drawn.append((bytes_label, megabytes, "perplexity of new text ÷ the full model's", ratio))
    figure, panels = plt.subplots(1, len(drawn), figsize=(4.1 * len(drawn), 4.6))
    for axes, (x_label, x, y_label, y) in zip(panels, drawn, strict=True):
        for index, (precision, colour) in enumerate(colours.items()):
            # When two decoders have one size, such as before and after training, the worse one comes first.
            line = sorted(
                (point for point in points if point.precision == precision and math.isfinite(y(point))),
                key=lambda p: (p.cost.weights, p.agreement.mean),
            )
            axes.plot([x(p) for p in line], [y(p) for p in line], color=colour, linewidth=1.5)
            for point in line:
                axes.plot(
                    x(point),
                    y(point),
                    color=colour,
                    marker=markers[point.name],
                    markersize=11 - 1.2 * index,  # where precisions agree, each marker stays visible
                    markeredgecolor="white",
                    markeredgewidth=0.7,
                    zorder=3 + index,
                )
        axes.set(xlabel=x_label, ylabel=y_label)
        axes.set_xlim(0, 1.05 * max(x(point) for point in points))  # no marker is cut
        if y is agreement:
            axes.set_ylim(top=101)
        axes.grid(alpha=0.3)
    lines = [Line2D([], [], color=colour, linewidth=3, label=precision) for precision, colour in colours.items()]
    shapes = [
        Line2D([], [], color="#444444", marker=markers[name], markersize=8, linestyle="none", label=name)
        for name in names
    ]
    figure.tight_layout(rect=(0, 0.13, 1, 1))
    style: dict[str, Any] = {"loc": "lower center", "ncols": 4, "frameon": False, "columnspacing": 1.6}
    figure.legend(handles=lines, bbox_to_anchor=(0.5, 0.065), **style)
    figure.legend(handles=shapes, bbox_to_anchor=(0.5, 0.0), **style)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _save(figure: Any, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)

"""Draw the plots of evaluations as PNG files. Needs no display."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
    """Draws agreement against decode bytes and against decode FLOPs, so that equal precisions can be compared.

    Each precision has one colour and one line, which joins the decoders in order of size. Each decoder has one marker.
    """
    names = list(dict.fromkeys(point.name for point in points))
    markers = dict(zip(names, cycle(_MARKERS), strict=False))
    colours = dict(zip(PRECISIONS, _COLOURS, strict=False))
    measures: list[tuple[str, Callable[[TradeoffPoint], float]]] = [
        ("weights read per token (MB)", lambda p: p.cost.bytes / 1e6),
        ("operations per token (MFLOP)", lambda p: p.cost.flops / 1e6),
    ]
    figure, panels = plt.subplots(1, 2, figsize=(8.2, 4.6), sharey=True)
    for axes, (label, measure) in zip(panels, measures, strict=True):
        for index, (precision, colour) in enumerate(colours.items()):
            # When two decoders have one size, such as before and after training, the worse one comes first.
            line = sorted(
                (point for point in points if point.precision == precision),
                key=lambda p: (p.cost.weights, p.agreement.mean),
            )
            axes.plot([measure(p) for p in line], [100 * p.agreement.mean for p in line], color=colour, linewidth=1.5)
            for point in line:
                axes.plot(
                    measure(point),
                    100 * point.agreement.mean,
                    color=colour,
                    marker=markers[point.name],
                    markersize=11 - 1.2 * index,  # where precisions agree, each marker stays visible
                    markeredgecolor="white",
                    markeredgewidth=0.7,
                    zorder=3 + index,
                )
        axes.set(xlabel=label)
        axes.set_xlim(0, 1.05 * max(measure(point) for point in points))  # no marker is cut
        axes.set_ylim(top=101)
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("agreement with the full model (%)")
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

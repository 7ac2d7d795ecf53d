"""Plots of evaluations, as PNG files. No display is needed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt

from overfill.pair.evaluate.costs import PRECISIONS
from overfill.pair.evaluate.token_metrics import Metric

if TYPE_CHECKING:
    from overfill.pair.evaluate.compare import TradeoffPoint

_COLOURS = ("#1b9e77", "#d95f02", "#7570b3", "#e7298a", "#66a61e", "#e6ab02", "#a6761d", "#666666")
_MARKERS = dict(zip(PRECISIONS, "os^v", strict=True))


def save_drift(path: Path, title: str, panels: Mapping[str, Mapping[str, Metric]]) -> None:
    """A panel per key of ``panels`` (its y label): a line per variant over the position in the answer.

    Points stand at the geometric middle of their bucket, position 0 at 0.5, and have bars of one standard error.
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
    """Agreement against decode bytes and against decode FLOPs; a colour per decoder, a marker per precision."""
    names = list(dict.fromkeys(point.name for point in points))
    measures: list[tuple[str, Callable[[TradeoffPoint], float]]] = [
        ("weights read per token (MB)", lambda p: p.cost.bytes / 1e6),
        ("MFLOP per token", lambda p: p.cost.flops / 1e6),
    ]
    figure, row = plt.subplots(1, 2, figsize=(11, 4.6), sharey=True)
    for axes, (label, measure) in zip(row, measures, strict=True):
        for index, name in enumerate(names):
            own = [point for point in points if point.name == name]
            colour = _COLOURS[index % len(_COLOURS)]
            axes.plot([measure(p) for p in own], [100 * p.agreement.mean for p in own], color=colour, alpha=0.4)
            for point in own:
                axes.plot(
                    measure(point),
                    100 * point.agreement.mean,
                    color=colour,
                    marker=_MARKERS[point.precision],
                    linestyle="none",
                    label=f"{name}, {point.precision}",
                )
        axes.set(xlabel=label, ylabel="top-1 agreement with the full model (%)")
        axes.set_xlim(left=0)
        axes.grid(alpha=0.3)
    row[1].legend(loc="center left", bbox_to_anchor=(1.02, 0.5), fontsize="small")
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)

"""Figures of a curve beside the other systems, losses first; how far the tools agree; and the plot."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from operator import attrgetter
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from overfill.lab.bench.curve.plan import APART_FROM, GUIDELLM, OTHERS, OURS, SHAPES, SYSTEMS, Point
from overfill.lab.bench.curve.results import PointFigures
from overfill.lab.measurement import Measurement

Measured = Mapping[Point, PointFigures]
"""The finished points of a curve."""

_AGREE, _FULL_LENGTH = 0.05, 0.99
"""Largest difference of two tools' figures that counts as agreement; smallest share of an answer that counts as all."""


_COMPARED = {
    "output": ("tokens/s", attrgetter("tokens_per_s")),
    "per user": ("tokens/s", attrgetter("per_user")),
    "first token": ("s", attrgetter("ttft_p50")),
}
_OF_TOOLS = {
    name: attrgetter(of) for name, of in (("output", "tokens_per_s"), ("first token", "ttft_p50"), ("gap", "gap_p50"))
}
_COLOURS = dict(zip(SYSTEMS, ("#d95f02", "#1b9e77", "#7570b3", "#666666"), strict=True))


def comparison(measured: Measured) -> list[Measurement]:
    """Returns the medians of our two systems, each beside the best of the others, the largest loss first."""
    found = _rounds(measured)
    rows: list[tuple[float, Measurement]] = []
    for (shape, system, users), rounds in found.items():
        if system not in OURS:
            continue
        for name, (unit, value) in _COMPARED.items():
            sign = 1 if unit == "tokens/s" else -1  # more is better, or less
            others = [
                (median(map(value, found[shape, other, users])), other)
                for other in OTHERS
                if (shape, other, users) in found
            ]
            best, peer = max(others, key=lambda one: sign * one[0], default=(None, None))
            row = Measurement.median(
                f"{shape.upper()} {system} at {users}: {name}", [*map(value, rounds)], unit, peer=peer, peer_value=best
            )
            rows.append(((row.peer_ratio or 1.0) ** sign, row))
    return [row for _, row in sorted(rows, key=lambda one: one[0])]


def losses(rows: Sequence[Measurement]) -> int:
    """Returns the number of ``comparison``'s rows in which another system is better."""
    return sum(1 for row in rows if row.peer_ratio is not None and (row.peer_ratio < 1) == (row.unit == "tokens/s"))


def checks(measured: Measured) -> list[Measurement]:
    """Returns whether the points count: failed requests, length of answers, and how far the tools differ.

    A tool is compared with guidellm on the same system, which leaves a core to the tool. The bound is 5 %, or the
    spread of guidellm's rounds of the same load on the curve if they differ by more.
    """
    rows = [
        Measurement("failed requests", sum(one.failed for one in measured.values()), "requests", bound=0),
        Measurement(
            "shortest mean answer",
            min(figures.answer / SHAPES[point.shape].answer for point, figures in measured.items()),
            "of what was asked",
            bound=_FULL_LENGTH,
            at_least=True,
        ),
    ]
    rounds = _rounds(measured)
    for point, figures in measured.items():
        beside = measured.get(replace(point, tool=GUIDELLM))
        if point.tool == GUIDELLM or beside is None:
            continue
        at = (point.shape, point.system, point.concurrency)
        for name, value in _OF_TOOLS.items():
            by_round = [value(one) for one in rounds.get((at[0], APART_FROM, at[2]), [beside])]
            spread = (max(by_round) - min(by_round)) / median(by_round)
            rows.append(
                Measurement(
                    f"{at[0].upper()} {at[1]} at {at[2]}: {name}, {point.tool} beside guidellm, difference",
                    abs(value(figures) / value(beside) - 1),
                    "",
                    bound=round(max(_AGREE, spread), 4),
                    peer="guidellm's rounds",
                    peer_value=spread or None,
                )
            )
    return rows


def pareto(points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """Returns the points that no other beats in one coordinate without losing in the other, by rising first one."""
    front: list[tuple[float, float]] = []
    for point in sorted(set(points), reverse=True):
        if not front or point[1] > front[-1][1]:
            front.append(point)
    return front[::-1]


def save_plot(path: Path, measured: Measured, title: str) -> None:
    """Plots tokens/s against tokens/s per user: a panel per shape, a line per system, bars over the rounds."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    found = _rounds(measured)
    shapes = [name for name in SHAPES if any(key[0] == name for key in found)]
    figure, axes = plt.subplots(1, len(shapes), figsize=(1 + 5 * len(shapes), 5), squeeze=False)
    for axis, shape in zip(axes[0], shapes, strict=True):
        middles: list[tuple[float, float]] = []
        for system in SYSTEMS:
            lines = sorted(
                (users, rounds) for (of, name, users), rounds in found.items() if (of, name) == (shape, system)
            )
            if not lines:
                continue
            x, x_bars = _bars([[one.per_user for one in rounds] for _, rounds in lines])
            y, y_bars = _bars([[one.tokens_per_s for one in rounds] for _, rounds in lines])
            axis.errorbar(x, y, xerr=x_bars, yerr=y_bars, marker="o", capsize=2, color=_COLOURS[system], label=system)
            for (users, _), *at in zip(lines, x, y, strict=True):
                axis.annotate(str(users), at, textcoords="offset points", xytext=(4, 4), fontsize=8)
            middles += zip(x, y, strict=True)
        front = pareto(middles)
        axis.plot(*zip(*front, strict=True), linestyle=":", color="black", linewidth=1, label="best of all")
        axis.set(
            title=SHAPES[shape].title, xlabel="tokens/s of a user (1 / median gap)", ylabel="tokens/s of all users"
        )
        axis.set_xlim(0, 1.1 * max(x for x, _ in middles))
        axis.set_ylim(0, 1.1 * max(y for _, y in middles))
        axis.legend(fontsize=8, title="numbers: requests at a time", title_fontsize=8)
    figure.suptitle(title, fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _bars(values: Sequence[Sequence[float]]) -> tuple[Any, Any]:
    """Returns arrays: the medians; and two rows, how far they are above the minima and below the maxima."""
    low, middle, high = np.transpose([np.percentile(one, (0, 50, 100)) for one in values])
    return middle, np.array((middle - low, high - middle))


def _rounds(measured: Measured) -> dict[tuple[str, str, int], list[PointFigures]]:
    """Returns guidellm's figures by shape, system and concurrency; one per round."""
    found: dict[tuple[str, str, int], list[PointFigures]] = defaultdict(list)
    for point, figures in measured.items():
        if point.tool == GUIDELLM:
            found[point.shape, point.system, point.concurrency].append(figures)
    return dict(found)

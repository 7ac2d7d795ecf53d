"""Plots of benchmark results, as files. No display is needed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt

_COLOURS = ("#d95f02", "#1b9e77", "#7570b3", "#e7298a")


def save_timeline(path: Path, title: str, layers: Sequence[tuple[float, float]], events: Mapping[str, float]) -> None:
    """Layers as horizontal bars over time (seconds), events as vertical lines; the suffix picks the format."""
    figure, axes = plt.subplots(figsize=(9, 5))
    starts = [1e3 * start for start, _ in layers]
    widths = [1e3 * (end - start) for start, end in layers]
    axes.barh(range(len(layers)), widths, left=starts, color="#8da0cb", label="layer computed")
    for colour, (name, time) in zip(_COLOURS, events.items(), strict=False):
        axes.axvline(1e3 * time, color=colour, linewidth=1.5, label=f"{name} ({1e3 * time:.0f} ms)")
    axes.set(title=title, xlabel="milliseconds since the first layer started", ylabel="layer")
    axes.invert_yaxis()
    axes.legend(loc="upper right")  # the bars run from upper left to lower right
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)

"""Draws speeds of engines as a bar chart. No display is needed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl

from overfill.lab.bench.engine.rows import Row

mpl.use("Agg")

import matplotlib.pyplot as plt

_COLOURS = ("#d95f02", "#1b9e77", "#7570b3", "#e7298a", "#66a61e", "#e6ab02")


def save_speeds(path: Path, title: str, rows: Sequence[Row]) -> None:
    """Draws a group of bars per batch and context: our engines, each with its bound, and the peers. Log scale."""
    rows = [row for row in rows if row.unit != "x"]
    groups = list(dict.fromkeys((row.batch, row.context) for row in rows))
    ours = list(dict.fromkeys(row.name for row in rows))
    peers = list(dict.fromkeys(row.peer for row in rows if row.peer is not None and row.peer_value is not None))
    labels = [*ours, *peers]
    width = 0.8 / len(labels)
    figure, axes = plt.subplots(figsize=(9, 4.6))
    for index, (label, colour) in enumerate(zip(labels, _COLOURS, strict=False)):
        for place, group in enumerate(groups):
            same = [row for row in rows if (row.batch, row.context) == group]
            own = next((row for row in same if row.name == label), None)
            value = own.value if own else next((row.peer_value for row in same if row.peer == label), None)
            if value is None:
                continue
            x = place + (index - (len(labels) - 1) / 2) * width
            axes.bar(x, value, width, color=colour, label=label if place == 0 else None)
            axes.text(x, value, f"{value:,.0f}", ha="center", va="bottom", fontsize=7)
            if own:
                ends = x - width / 2, x + width / 2
                first = place == 0 and label == ours[0]
                axes.hlines(own.bound, *ends, color="black", linewidth=1.5, label="bound" if first else "_")
    several = len({context for _, context in groups}) > 1
    names = [f"batch {batch}" + (f"\n{context} tokens" if several else "") for batch, context in groups]
    axes.set_xticks(range(len(groups)), names)
    axes.set(title=title, ylabel="tokens/s", yscale="log")
    axes.grid(axis="y", alpha=0.3)
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)

"""Draws the latencies of servers under load. No display is needed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path

import matplotlib as mpl
import numpy as np

from overfill.lab.traffic.outcome import Objective, Outcome

mpl.use("Agg")

import matplotlib.pyplot as plt

_COLOURS = ("#1b9e77", "#d95f02", "#7570b3", "#e7298a", "#66a61e", "#e6ab02", "#a6761d", "#666666")


def save_latencies(
    path: Path, title: str, outcomes: Mapping[str, Sequence[Outcome]], objective: Objective | None
) -> None:
    """Draws the distributions of the time to first token and of the mean time between tokens, a line per target."""
    figure, row = plt.subplots(1, 2, figsize=(11, 4.4), sharey=True)
    limits = (None, None) if objective is None else (objective.ttft, objective.itl)
    panels = (("ttft", "time to first token (s)"), ("itl", "mean time between tokens (s)"))
    for axes, (name, label), limit in zip(row, panels, limits, strict=True):
        for colour, (target, of_one) in zip(cycle(_COLOURS), outcomes.items(), strict=False):
            values = sorted(getattr(outcome, name) for outcome in of_one if outcome.ok)
            shares = 100 * np.arange(1, len(values) + 1) / len(of_one)
            axes.step(values, shares, where="post", color=colour, label=target)
        if limit is not None:
            axes.axvline(limit, color="black", linestyle="--", linewidth=1, label="objective")
        axes.set(xlabel=label, ylabel="requests (%)", xscale="log", ylim=(0, 101))
        axes.grid(alpha=0.3)
        axes.legend()
    figure.suptitle(title, fontsize="medium")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)

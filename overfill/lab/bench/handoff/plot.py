"""Draws the timeline of a handoff. No display is needed."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl

from overfill.lab.bench.handoff.timeline import Timeline

mpl.use("Agg")

import matplotlib.pyplot as plt

_COLOURS = ("#d95f02", "#1b9e77", "#7570b3")


def save_timeline(path: Path, timeline: Timeline) -> None:
    """Draws layers as horizontal bars and events as vertical lines; the file's suffix picks the format."""
    events = {
        "first KV sent": timeline.first_kv_sent,
        "first token sent": timeline.first_token_sent,
        "last KV sent": timeline.last_kv_sent,
    }
    figure, axes = plt.subplots(figsize=(9, 5))
    starts = [1e3 * start for start, _ in timeline.layers]
    widths = [1e3 * (end - start) for start, end in timeline.layers]
    axes.barh(range(len(starts)), widths, left=starts, color="#8da0cb", label="layer computed")
    for colour, (name, time) in zip(_COLOURS, events.items(), strict=True):
        axes.axvline(1e3 * time, color=colour, linewidth=1.5, label=f"{name} ({1e3 * time:.0f} ms)")
    axes.set(
        title=f"Prefill of {timeline.tokens} tokens",
        xlabel="milliseconds since the first layer started",
        ylabel="layer",
    )
    axes.invert_yaxis()
    axes.legend(loc="upper right")  # the bars run from upper left to lower right
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)

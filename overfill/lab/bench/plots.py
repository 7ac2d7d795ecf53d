"""Plots of benchmark results, as files. No display is needed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt

if TYPE_CHECKING:
    from overfill.lab.bench.burst import BurstResult
    from overfill.lab.bench.rows import Row

_COLOURS = ("#d95f02", "#1b9e77", "#7570b3", "#e7298a", "#66a61e", "#e6ab02")


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


def save_memory(path: Path, title: str, requests: Sequence[int], resident: Sequence[int], warm: int) -> None:
    """Resident bytes over requests answered; what comes before sample ``warm`` is shaded."""
    figure, axes = plt.subplots(figsize=(9, 3.6))
    axes.plot(requests, [size / 2**20 for size in resident], color=_COLOURS[1], linewidth=1.5)
    axes.axvspan(0, requests[warm], color="#dddddd", label="warm-up")
    axes.set(title=title, xlabel="requests answered", ylabel="resident memory, MiB", xlim=(0, requests[-1]))
    axes.set_ylim(0, 1.15 * max(resident) / 2**20)
    axes.legend(loc="lower right")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def save_burst(path: Path, result: BurstResult) -> None:
    """Workers of each stage over time above requests in the stack, and each answer's gap between tokens below."""
    burst, times = result.burst, [sample.at for sample in result.samples]
    figure, (above, below) = plt.subplots(2, 1, sharex=True, figsize=(9, 6))
    for stage, colour in (("prefill", _COLOURS[2]), ("decode", _COLOURS[0])):
        workers = [getattr(sample, stage) for sample in result.samples]
        above.step(times, workers, where="post", color=colour, linewidth=1.8, label=f"{stage} workers")
    above.set(ylabel="workers", ylim=(0, max(result.most("decode"), result.most("prefill")) + 0.6))
    requests = above.twinx()
    requests.fill_between(times, [sample.requests for sample in result.samples], color="#bbbbbb", zorder=1)
    requests.set_ylabel("requests in the stack")
    above.set_zorder(requests.get_zorder() + 1)
    above.patch.set_visible(False)
    below.plot([at for at, _ in result.itl], [1e3 * v for _, v in result.itl], ".", color=_COLOURS[1], markersize=3)
    below.set(xlabel="seconds", ylabel="ms between tokens, by arrival", ylim=(0, None))
    for axes in (requests, below):
        axes.axvspan(burst.before, burst.before + burst.during, color="#fff2cc", zorder=0)
    above.legend(loc="upper right")
    failed = f"{len(result.errors)} failed"
    above.set_title(f"{burst.burst_rate:g} requests/s after {burst.rate:g}: {result.answers} answers, {failed}")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def save_speeds(path: Path, title: str, rows: Sequence[Row]) -> None:
    """A group of bars per batch and context: ours, with its bound as a line above, and the peers; log scale."""
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

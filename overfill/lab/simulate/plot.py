"""Plots a simulated run over time to a file. Needs no display."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt

from overfill.lab.simulate.result import SimulationResult

_PREFILL, _DECODE, _GREY = "#d95f02", "#1b9e77", "#666666"


def save_timeline(path: Path, title: str, result: SimulationResult) -> None:
    """Plots arrivals, workers and utilisation of both pools over minutes. The suffix of ``path`` chooses the format."""
    samples = result.samples[1:]  # the first snapshot covers no time
    minutes = [sample.time / 60 for sample in samples]
    ends = [0.0, *(sample.time for sample in samples)]
    spans = [max(1e-9, b - a) for a, b in pairwise(ends)]
    figure, (load, workers, busy) = plt.subplots(3, 1, sharex=True, figsize=(9, 7))
    load.plot(minutes, [s.arrived / span for s, span in zip(samples, spans, strict=True)], color=_GREY, linewidth=1)
    load.set(title=title, ylabel="requests/s")
    queue = load.twinx()
    queue.plot(minutes, [s.waiting for s in samples], color="#7570b3", linewidth=1)
    queue.set_ylabel("waiting in the router", color="#7570b3")
    for name, colour, ready, target in (
        ("prefill", _PREFILL, [s.prefill_ready for s in samples], [s.prefill_target for s in samples]),
        ("decode", _DECODE, [s.decode_ready for s in samples], [s.decode_target for s in samples]),
    ):
        workers.step(minutes, ready, where="post", color=colour, label=f"{name}, ready")
        if any(value is not None for value in target):
            targets = [float("nan") if value is None else value for value in target]
            workers.step(minutes, targets, where="post", color=colour, linestyle=":", label=f"{name}, target")
    workers.set(ylabel="workers")
    workers.set_ylim(bottom=0)
    workers.legend(loc="upper right", fontsize=8)
    for name, colour, share in (
        ("prefill", _PREFILL, [s.prefill_busy for s in samples]),
        ("decode", _DECODE, [s.decode_busy for s in samples]),
    ):
        busy.plot(minutes, _smooth([100 * value for value in share]), color=colour, linewidth=1, label=name)
    busy.set(xlabel="minutes", ylabel="busy, %", ylim=(0, 105))
    busy.legend(loc="lower right", fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    plt.close(figure)


def _smooth(values: Sequence[float], width: int = 5) -> list[float]:
    """Returns the moving average over ``width`` values."""
    smooth = []
    for index in range(len(values)):
        part = values[max(0, index - width + 1) : index + 1]
        smooth.append(sum(part) / len(part))
    return smooth

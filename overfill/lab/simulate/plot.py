"""Plots simulated runs over time to a file. Needs no display."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt

from overfill.lab.simulate.request import SimRequest
from overfill.lab.simulate.result import SimulationResult
from overfill.lab.traffic.outcome import Objective

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


def save_tiers(path: Path, title: str, results: Mapping[str, SimulationResult], objective: Objective) -> None:
    """Plots runs with tiers side by side, over minutes of arrival.

    The rows show requests, the share that met the objective, refusals, and which tier wrote the answers.

    Args:
        results: Heading -> run.
    """
    figure, axes = plt.subplots(
        4, len(results), sharex=True, sharey="row", figsize=(6 * len(results), 9), squeeze=False
    )
    for column, (heading, result) in enumerate(results.items()):
        load, met, refused, shares = axes[:, column]
        span = max(request.trace.arrival for request in result.requests)
        width = max(1.0, span / 60)
        bins: list[list[SimRequest]] = [[] for _ in range(max(1, int(span / width)))]
        for request in result.requests:
            bins[min(len(bins) - 1, int(request.trace.arrival / width))].append(request)
        minutes = [(index + 0.5) * width / 60 for index in range(len(bins))]
        load.plot(minutes, [len(part) / width for part in bins], color=_GREY, linewidth=1)
        load.set(title=heading, ylabel="requests/s", ylim=(0, None))
        tiers = [tier.name for tier in result.options.all_tiers(result.profile)]
        answers = [[request for request in part if request.ok] for part in bins]
        stacked = []
        for tier, colour in zip(tiers, _colours(tiers), strict=True):
            asking = [[request for request in part if request.asked == tier] for part in bins]
            if any(asking):
                kept = [_percent(sum(result.meets(r, objective) for r in part), len(part)) for part in asking]
                met.plot(minutes, kept, color=colour, linewidth=1, label=tier)
                rate = [sum(request.error == "Overloaded" for request in part) / width for part in asking]
                refused.plot(minutes, rate, color=colour, linewidth=1, label=tier)
            stacked.append([_percent(sum(r.job.tier == tier for r in part), len(part)) for part in answers])
        met.set(ylabel="met the objective, %", ylim=(0, 105))
        met.legend(title="tier asked for", loc="lower left", fontsize=8, title_fontsize=8)
        refused.set(ylabel="refused/s", ylim=(0, None))
        shares.stackplot(minutes, stacked, labels=tiers, colors=_colours(tiers))
        shares.set(xlabel="minutes", ylabel="answers by tier, %", ylim=(0, 100))
        shares.legend(loc="lower left", fontsize=8)
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    plt.close(figure)


def _percent(part: int, whole: int) -> float:
    return 100 * part / whole if whole else float("nan")


def _colours(tiers: Sequence[str]) -> list[str]:
    return [f"C{index}" for index in range(len(tiers))]


def _smooth(values: Sequence[float], width: int = 5) -> list[float]:
    """Returns the moving average over ``width`` values."""
    smooth = []
    for index in range(len(values)):
        part = values[max(0, index - width + 1) : index + 1]
        smooth.append(sum(part) / len(part))
    return smooth

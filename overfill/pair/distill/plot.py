"""Learning curves as a picture: one run, or several side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from overfill.errors import InvalidRequest
from overfill.pair.distill.metrics import METRICS, read_metrics


def metrics_file(folder: Path) -> Path:
    """The metrics of a run's folder or of a pair that came out of one.

    Raises:
        InvalidRequest: there are none.
    """
    for file in (folder / METRICS, folder / "distill" / METRICS):
        if file.exists():
            return file
    raise InvalidRequest("", f"{folder} holds no {METRICS}; name a distilled pair, or the .run folder beside it")


def plot_runs(runs: Sequence[tuple[str, Path]], out: Path) -> None:
    """Draws training loss, held-out likelihood and agreement against answer tokens learnt.

    Args:
        runs: (label, metrics file) of each.
        out: the picture; its suffix says which kind.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4), layout="constrained")
    loss, nll, agreement = figure.subplots(1, 3)
    for label, file in runs:
        entries = read_metrics(file)
        steps = [entry for entry in entries if "loss" in entry]
        judged = [entry for entry in entries if "held_out" in entry]
        tokens = [entry["tokens"] for entry in judged]
        loss.plot([e["tokens"] for e in steps], _smoothed([e["loss"] for e in steps]), label=label)
        nll.plot(tokens, [e["held_out"]["nll"] for e in judged], marker=".", label=label)
        agreement.plot(tokens, [100 * e["held_out"]["agreement"] for e in judged], marker=".", label=label)
    _finish(loss, "training loss (nats per token)")
    _finish(nll, "held-out NLL (nats per token)")
    _finish(agreement, "held-out agreement with the full model (%)")
    figure.savefig(out, dpi=120)


def _finish(axes: Any, title: str) -> None:
    axes.set_title(title, fontsize=10)
    axes.set_xlabel("answer tokens learnt")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


def _smoothed(values: Sequence[float], keep: float = 0.9) -> list[float]:
    """An exponential mean without the pull towards zero at the start."""
    smoothed, total, weight = [], 0.0, 0.0
    for value in values:
        total, weight = keep * total + value, keep * weight + 1
        smoothed.append(total / weight)
    return smoothed

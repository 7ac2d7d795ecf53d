"""Draws the learning curves of one run or of several."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from overfill.errors import InvalidRequest
from overfill.making.distill.metrics import METRICS, read_metrics


def metrics_file(folder: Path) -> Path:
    """Returns the metrics file in a run's folder or in a distilled pair.

    Raises:
        InvalidRequest: the folder has none.
    """
    for file in (folder / METRICS, folder / "distill" / METRICS):
        if file.exists():
            return file
    raise InvalidRequest("", f"{folder} holds no {METRICS}; name a distilled pair, or the .run folder beside it")


def plot_runs(runs: Sequence[tuple[str, Path]], out: Path) -> None:
    """Draws training loss, held-out NLL and agreement against the number of answer tokens learnt.

    The legend has each run's label and its minutes of training.

    Args:
        runs: (label, metrics file) of each run.
        out: Picture to write; the suffix sets its format.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4), layout="constrained")
    loss, nll, agreement = figure.subplots(1, 3)
    for label, file in runs:
        entries = read_metrics(file)
        steps = [entry for entry in entries if "loss" in entry]
        judged = [entry for entry in entries if "held_out" in entry]
        tokens = [entry["tokens"] for entry in judged]
        label = f"{label}, {max((entry['seconds'] for entry in entries), default=0) / 60:.0f} min"
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
    """Returns the exponential moving average, corrected for its start at zero."""
    smoothed, total, weight = [], 0.0, 0.0
    for value in values:
        total, weight = keep * total + value, keep * weight + 1
        smoothed.append(total / weight)
    return smoothed

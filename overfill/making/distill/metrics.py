"""Records a run's metrics: ``metrics.jsonl`` (an object per step and per evaluation) and TensorBoard events."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from overfill.making.distill.run_checkpoints import TrainingState
from overfill.making.distill.student import HeldOutResult

METRICS = "metrics.jsonl"


class Metrics:
    """Appends to the metrics in ``folder``. Drops entries after ``progress``, which an interrupted run left."""

    def __init__(self, folder: Path, progress: TrainingState) -> None:
        from torch.utils.tensorboard import SummaryWriter

        folder.mkdir(parents=True, exist_ok=True)
        file = folder / METRICS
        kept = [entry for entry in read_metrics(file) if entry["step"] <= progress.step] if file.exists() else []
        rewritten = file.with_suffix(".tmp")
        rewritten.write_text("".join(json.dumps(entry) + "\n" for entry in kept), encoding="utf-8")
        rewritten.replace(file)
        self.evaluated = {entry["step"] for entry in kept if "held_out" in entry}
        self._file = file.open("a", encoding="utf-8")
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=progress.step + 1)

    def step(self, progress: TrainingState, values: dict[str, float]) -> None:
        """Records a training step's means."""
        self._write(progress, values, values, "train")

    def held_out(self, progress: TrainingState, result: HeldOutResult) -> None:
        """Records an evaluation."""
        self.evaluated.add(progress.step)
        self._write(progress, {"held_out": result.as_dict()}, result.as_dict(), "held_out")

    def close(self) -> None:
        self._file.close()
        self._board.close()

    def _write(self, progress: TrainingState, entry: dict[str, Any], scalars: dict[str, float], group: str) -> None:
        where = {"step": progress.step, "tokens": progress.tokens, "seconds": round(progress.seconds, 3)}
        self._file.write(json.dumps(where | entry) + "\n")
        self._file.flush()
        for name, value in scalars.items():
            self._board.add_scalar(f"{group}/{name}", value, progress.step)


def read_metrics(file: Path) -> list[dict[str, Any]]:
    """Reads every whole line of ``file``; skips a line that a killed process left half-written."""
    entries = []
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            entries.append(json.loads(line))
        except ValueError:
            continue
    return entries

"""The learning rate's course over a run."""

from __future__ import annotations

import math

from overfill.pair.distill.recipe import Training


def learning_rate(training: Training, done: float) -> float:
    """A linear rise over ``warmup``, then a cosine down to ``final_rate``; ``done`` is the share of the run."""
    if done < training.warmup:
        return training.learning_rate * done / training.warmup
    after = (done - training.warmup) / (1 - training.warmup) if training.warmup < 1 else 1.0
    cosine = (1 + math.cos(math.pi * min(after, 1.0))) / 2
    return training.learning_rate * (training.final_rate + (1 - training.final_rate) * cosine)

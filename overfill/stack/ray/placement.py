"""Checks that a stack fits on machines, and computes how much each worker reserves. Arithmetic; no Ray."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from overfill.errors import OverfillError
from overfill.settings.tiers import PoolSpec
from overfill.stack.spec import StackSpec


class NoRoom(OverfillError):
    """The machines have fewer resources than the stack reserves."""


def check_room(spec: StackSpec, machines: Sequence[Mapping[str, float]]) -> None:
    """Raises NoRoom unless a stack's initial replicas fit on ``machines``; places them first-fit, largest first.

    Args:
        machines: resources of each machine, by Ray's names (``CPU``, ``GPU``, ...).
    """
    free = [dict(machine) for machine in machines]
    replicas = [(name, demand(pool)) for name, pool in spec.deployments.items() for _ in range(pool.replicas)]
    for name, needs in sorted(replicas, key=lambda item: sorted(item[1].values()), reverse=True):
        machine = next((m for m in free if all(m.get(key, 0.0) + 1e-9 >= n for key, n in needs.items())), None)
        if machine is None:
            raise NoRoom(_lacking(spec, machines, name))
        for key, amount in needs.items():
            machine[key] -= amount


def demand(pool: PoolSpec) -> dict[str, float]:
    """Returns the resources that one replica reserves; omits those of amount 0."""
    needs = {"CPU": pool.num_cpus, "GPU": pool.num_gpus} | pool.resources
    return {name: amount for name, amount in needs.items() if amount > 0}


def share(capacity: float, workers: int) -> float:
    """Returns an equal share of ``capacity`` for each of ``workers``, rounded down to hundredths, at least 0.01."""
    return max(0.01, math.floor(100 * capacity / workers) / 100)


def gpu_share(gpus: float, workers: int) -> float:
    """Returns each worker's share of a GPU such that no worker spans two GPUs; 0 without GPUs."""
    return 1.0 / math.ceil(workers / gpus) if gpus >= 1 else 0.0


def _lacking(spec: StackSpec, machines: Sequence[Mapping[str, float]], name: str) -> str:
    total: dict[str, float] = {}
    for pool in spec.deployments.values():
        for key, amount in demand(pool).items():
            total[key] = total.get(key, 0.0) + amount * pool.replicas
    available = {key: sum(machine.get(key, 0.0) for machine in machines) for key in total}
    short = [key for key, amount in total.items() if amount > available[key] + 1e-9]
    if short:
        figures = ", ".join(f"{key}: {total[key]:g} needed, {available[key]:g} available" for key in short)
        return f"the cluster is too small for this stack ({figures}): start fewer workers, or reserve less for each"
    needs = ", ".join(f"{amount:g} {key}" for key, amount in demand(spec.deployments[name]).items())
    return f"no machine of the cluster can hold another {name} replica, which reserves {needs}: reserve less for each"

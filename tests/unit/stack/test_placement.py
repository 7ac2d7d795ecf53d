"""Tests whether a stack fits machines, and which resources its workers reserve."""

from __future__ import annotations

from typing import Any

import pytest

from overfill.stack.ray.placement import NoRoom, check_room, gpu_share, share
from overfill.stack.spec import StackSpec


def spec(**fields: Any) -> StackSpec:
    return StackSpec.model_validate({"pair": "pair", "router": {"num_cpus": 0.2}} | fields)


def test_six_processes_fit_two_cores() -> None:
    check_room(spec(prefill={"replicas": 2}, decode={"replicas": 3}), [{"CPU": 2.0}])


def test_the_resource_that_is_short_is_named_with_the_amount_available() -> None:
    with pytest.raises(NoRoom, match=r"GPU: 3 needed, 2 available"):
        check_room(spec(decode={"replicas": 3, "num_gpus": 1}), [{"CPU": 8.0, "GPU": 2.0}])
    with pytest.raises(NoRoom, match=r"CPU: 5.5 needed, 2 available"):
        check_room(spec(decode={"num_cpus": 5}), [{"CPU": 2.0}])
    with pytest.raises(NoRoom, match=r"H100: 1 needed, 0 available"):
        check_room(spec(prefill={"resources": {"H100": 1}}), [{"CPU": 2.0}])


def test_a_replica_needs_one_machine_that_has_room_for_it() -> None:
    machines = [{"CPU": 2.0}, {"CPU": 2.0}]
    check_room(spec(prefill={"num_cpus": 1.5}, decode={"num_cpus": 1.5}), machines)
    with pytest.raises(NoRoom, match="no machine of the cluster can hold another decode replica, which reserves 3 CPU"):
        check_room(spec(decode={"num_cpus": 3}), machines)


def test_the_shares_of_all_workers_fit() -> None:
    for workers in range(1, 40):
        assert share(1.8, workers) * workers <= 1.8 + 1e-9
    assert share(0.05, 100) == 0.01


@pytest.mark.parametrize(
    ("gpus", "workers", "expected"), [(1, 2, 0.5), (2, 2, 1.0), (3, 4, 0.5), (8, 3, 1.0), (0, 2, 0)]
)
def test_no_worker_straddles_two_gpus(gpus: int, workers: int, expected: float) -> None:
    assert gpu_share(gpus, workers) == expected
    if gpus:
        assert gpus * int(1 / expected) >= workers

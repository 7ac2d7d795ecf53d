"""Tests the parts of ``up`` on Ray that need no Ray: the spec made of a plan, reports of status, option conflicts."""

from __future__ import annotations

import importlib.util
import os
import socket
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from described import described

from overfill.cli import up
from overfill.cli.main import main
from overfill.settings.reader import BadSettings
from overfill.stack.describe import RayPlacement
from overfill.stack.ray.runner import RayRunner, failed, progress
from overfill.stack.spec import StackSpec

Machine = Callable[..., None]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    """Sets the numbers of this machine's CPUs and GPUs. Without a call: two cores."""

    def have(cpus: int = 2, gpus: int = 0) -> None:
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cpus)))
        monkeypatch.setattr("overfill.stack.describe.gpu_count", lambda: gpus)

    have()
    return have


@pytest.fixture(autouse=True)
def _two_cores(machine: Machine) -> None: ...


def on_ray(*tiers: str, placement: RayPlacement | None = None, **settings: Any) -> StackSpec:
    own = {"prefill": 2, "decode": 3, "port": 7600, "threads": 1} | settings
    made = described(*tiers, ray=placement or RayPlacement(), **own)
    assert StackSpec.read(made.document()) == made
    return made


def test_on_this_machine_everything_fits_with_room_for_the_most_workers() -> None:
    made = on_ray(placement=RayPlacement(max_decode=8))
    assert made.prefill is not None
    assert made.decode is not None
    assert (made.decode.replicas, made.decode.most) == (3, 8)
    assert made.router.num_cpus + 10 * made.decode.num_cpus <= 2
    assert made.prefill.num_gpus == 0


def gpus_of(made: StackSpec) -> dict[str, float]:
    return {name: pool.num_gpus for name, pool in made.pools.items()}


def test_gpus_of_this_machine_are_shared_and_those_of_a_cluster_are_asked_for(machine: Machine) -> None:
    machine(32, 2)
    assert gpus_of(on_ray())["decode"] == pytest.approx(1 / 3)
    assert gpus_of(on_ray(device="cpu"))["decode"] == 0
    joined = on_ray(placement=RayPlacement(ray_address="auto", worker_gpus=1))
    assert joined.decode is not None
    assert (joined.decode.num_gpus, joined.decode.num_cpus) == (1, 1)


def test_a_worker_reserves_a_gpu_for_each_rank(machine: Machine) -> None:
    machine(32, 4)
    own = {"engine": "vllm", "prefill": 1, "prefill_tensor_parallel_size": "2"}
    assert gpus_of(on_ray(**own, decode=4)) == {"prefill": 2, "decode": 0.5}, "the others share what is left"
    assert gpus_of(on_ray(**own, device="cpu")) == {"prefill": 0, "decode": 0}
    joined = on_ray(**own, placement=RayPlacement(ray_address="auto", worker_gpus=0.5))
    assert gpus_of(joined) == {"prefill": 2, "decode": 0.5}
    assert {name: pool.num_cpus for name, pool in joined.pools.items()} == {"prefill": 2, "decode": 1}
    assert gpus_of(on_ray(**own, placement=RayPlacement(ray_address="auto"))) == {"prefill": 0, "decode": 0}
    machine(32, 2)
    with pytest.raises(
        BadSettings, match=r"the ranks take 2 of this machine's 2, .* the other workers \(3 of decode\)"
    ):
        on_ray(**own)
    machine(32, 0)
    assert gpus_of(on_ray(**own)) == {"prefill": 0, "decode": 0}


def test_each_stage_reserves_for_its_own_threads_and_device(monkeypatch: pytest.MonkeyPatch, machine: Machine) -> None:
    machine(32, 2)
    monkeypatch.setenv("OVERFILL_PREFILL_DEVICE", "cuda:1")
    monkeypatch.setenv("OVERFILL_DECODE_DEVICE", "cpu")
    monkeypatch.setenv("OVERFILL_DECODE_THREADS", "4")
    assert gpus_of(on_ray(threads=None)) == {"prefill": 1, "decode": 0}, "only prefill workers share the GPUs"
    joined = on_ray(threads=None, placement=RayPlacement(ray_address="auto", worker_gpus=1))
    assert gpus_of(joined) == {"prefill": 1, "decode": 0}
    threads = joined.worker_config("prefill").threads
    assert {name: pool.num_cpus for name, pool in joined.pools.items()} == {"prefill": threads, "decode": 4}


def test_each_tier_is_a_pool_with_its_own_bounds_device_and_settings(machine: Machine) -> None:
    machine(8, 2)
    tiers = ("full=p,device=cuda,fallback=fast", "fast=q:2,max=6,device=cpu,quantize=int8,itl-objective=0.05")
    made = on_ray(*tiers, prefill=1, brownout="full > fast")
    full, fast = made.tiers["full"], made.tiers["fast"]
    assert (full.pair, full.fallback, full.replicas, full.max_replicas, full.num_gpus) == ("p", "fast", 1, None, 1)
    assert (fast.pair, fast.replicas, fast.max_replicas, fast.num_gpus, fast.itl_objective) == ("q", 2, 6, 0, 0.05)
    assert full.num_cpus == 0.97, "8 CPUs, without the router's, for at most 8 workers"
    assert made.worker_config("decode-fast").quantize == "int8"  # type: ignore[union-attr]
    assert made.router_config().brownout == ("full", "fast")
    stack = RayRunner(made, print)
    described = {pool: stack.describe_workers(pool) for pool in made.pools if made.tier_of(pool)}
    assert described == {"decode-full": "1 on Ray", "decode-fast": "2 to 6 on Ray"}


def status(app: str = "DEPLOYING", message: str = "", **deployments: tuple[str, dict[str, int], str]) -> Any:
    def value(text: str) -> Any:
        return SimpleNamespace(value=text)

    return SimpleNamespace(
        status=value(app),
        message=message,
        deployments={
            name: SimpleNamespace(status=value(state), replica_states=replicas, message=said)
            for name, (state, replicas, said) in deployments.items()
        },
    )


def test_progress_is_reported_in_one_line() -> None:
    told = progress(
        status(router=("HEALTHY", {"RUNNING": 1}, ""), decode=("UPDATING", {"STARTING": 2, "RUNNING": 1}, "soon"))
    )
    assert told == "decode: 1 running, 2 starting; router: 1 running"


def test_a_start_fails_with_what_serve_says_or_when_there_is_no_room_for_long() -> None:
    assert failed(status(decode=("UPDATING", {"STARTING": 1}, "")), True) is None
    broken = status("DEPLOY_FAILED", "", decode=("DEPLOY_FAILED", {}, "no pair at /nowhere"))
    assert "no pair at /nowhere" in (failed(broken, False) or "")
    waits = "2 replicas that have taken more than 30s to be scheduled. Resources required: {'GPU': 1}"
    crowded = status(decode=("UPDATING", {"STARTING": 2}, waits))
    assert failed(crowded, False) is None
    assert "the decode replicas do not fit on the cluster: " in (failed(crowded, True) or "")


@pytest.mark.parametrize("command", ["up", "demo"])
def test_without_ray_the_error_says_what_to_do(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "ray" else find(name, *rest))
    assert main([command, "--tier", "a=/no/such/pair"]) == 1
    err = capsys.readouterr().err
    assert "[server]'" in err
    assert "--no-ray" in err


@pytest.mark.usefixtures("unchecked")
def test_ray_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    stacks: list[Any] = []
    monkeypatch.setattr(up, "run", lambda stack, stopping, adapters: stacks.append(stack) or 0)
    assert main(["up", "--pair", "p", "--no-ray"]) == 0
    assert main(["up", "--pair", "p"]) == 0
    assert [type(stack).__name__ for stack in stacks] == ["ProcessRunner", "RayRunner"]


def test_a_missing_cluster_is_reported_at_once(tiny_pair: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    assert (
        main(["up", "--engine", "mock", "--pair", str(tiny_pair), "--grpc", "0", "--ray-address", f"127.0.0.1:{port}"])
        == 1
    )
    assert f"no Ray cluster at 127.0.0.1:{port}" in capsys.readouterr().err

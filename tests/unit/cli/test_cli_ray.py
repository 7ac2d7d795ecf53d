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
from overfill.stack.describe import RayPlacement
from overfill.stack.ray.runner import RayRunner, describe, failed, progress
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


def test_settings_arrive_and_each_replica_is_left_its_own() -> None:
    made = on_ray(dtype="float32", kv_memory="64MiB", grace_period="7", http=8000)
    assert made.prefill is not None
    assert made.decode is not None
    assert (made.prefill.replicas, made.decode.replicas) == (2, 3)
    assert made.worker_config("decode").kv_memory == 64 << 20
    assert made.worker_config("prefill").dtype == "float32"
    assert made.grace_period == 7
    assert (made.router.ports, made.router.http_ports) == ((7600,), (8000,))
    given = {*made.settings, *made.decode.settings, *made.router.settings}
    assert not {"worker_id", "routers", "port", "expect_decode"} & given


def test_the_engine_of_each_stage_arrives() -> None:
    made = on_ray(engine_args='{"enforce_eager": true}', prefill_engine="vllm", decode_engine="overfill")
    prefill, decode = made.worker_config("prefill"), made.worker_config("decode")
    assert (prefill.engine, prefill.engine_args) == ("vllm", '{"enforce_eager": true}')
    assert (decode.engine, decode.engine_args) == ("overfill", "")


def test_several_routers_have_a_port_each() -> None:
    made = on_ray(routers=2, http=8000)
    assert (made.router.replicas, made.router.ports, made.router.http_ports) == (2, (7600, 7601), (8000, 8001))


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


def test_workers_with_both_stages_are_a_deployment(machine: Machine) -> None:
    machine(8, 1)
    made = on_ray(prefill=0, decode=1, colocated=2, ttft_objective=1)
    assert made.colocated is not None
    assert made.decode is not None
    assert (made.colocated.replicas, made.prefill, made.decode.replicas) == (2, None, 1)
    assert made.colocated.num_gpus == pytest.approx(1 / 3)
    assert made.colocated.num_cpus == pytest.approx(2.6)
    assert made.worker_config("colocated").ttft_objective == 1  # type: ignore[union-attr]
    stack = RayRunner(made, print)
    assert [stack.describe_workers(pool) for pool in made.pools] == ["2 on Ray", "1 on Ray"]
    made = on_ray("a=p:0,itl-objective=0.05", "b=q:2", prefill=0, colocated=1)
    assert [*made.deployments] == ["router", "colocated", "decode-b"]
    colocated = made.worker_config("colocated")
    assert (colocated.tier, colocated.itl_objective) == ("a", 0.05)  # type: ignore[union-attr]


def test_mock_workers_stay_mock_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OVERFILL_DECODE_ENGINE_ARGS", '{"step": 0.05}')
    made = on_ray(engine="mock")
    monkeypatch.delenv("OVERFILL_DECODE_ENGINE_ARGS")
    assert made.worker_config("decode").engine == "mock"
    assert made.worker_config("decode").engine_args == '{"step": 0.05}'


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


def test_serves_reason_for_an_unhealthy_deployment_is_shown() -> None:
    said = describe(status(decode=("UNHEALTHY", {"STARTING": 1}, "A replica's health check failed.\nTraceback")))
    assert said == {"decode": "1 starting; A replica's health check failed."}


def test_a_start_fails_with_what_serve_says_or_when_there_is_no_room_for_long() -> None:
    assert failed(status(decode=("UPDATING", {"STARTING": 1}, "")), True) is None
    broken = status("DEPLOY_FAILED", "", decode=("DEPLOY_FAILED", {}, "no pair at /nowhere"))
    assert "no pair at /nowhere" in (failed(broken, False) or "")
    waits = "2 replicas that have taken more than 30s to be scheduled. Resources required: {'GPU': 1}"
    crowded = status(decode=("UPDATING", {"STARTING": 2}, waits))
    assert failed(crowded, False) is None
    assert "the decode replicas do not fit on the cluster: " in (failed(crowded, True) or "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--no-ray", "--max-decode", "3"], "--no-ray conflicts with --max-decode"),
        (["--no-ray", "--ray-address", "auto", "--name", "x"], "--no-ray conflicts with --ray-address, --name"),
        (["--decode", "3", "--max-decode", "2"], "--max-decode 2 is less than --decode 3"),
        (["--ray-address", "auto", "--device", "cuda"], "--device cuda needs --worker-gpus with --ray-address"),
    ],
)
def test_conflicting_options_are_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["up", "--pair", "/no/such/pair", *arguments]) == 2
    assert message in capsys.readouterr().err


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


def test_ray_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    stacks: list[Any] = []
    monkeypatch.setattr(up, "run", lambda stack, stopping: stacks.append(stack) or 0)
    monkeypatch.setattr(up, "check_ports", lambda spec: None)
    monkeypatch.setattr(up, "resolve_pairs", lambda spec, report: spec)
    monkeypatch.setattr(up, "check_engines", lambda spec: None)
    monkeypatch.setattr("overfill.cli.up.resolve_pair", lambda pair, report: Path(pair))
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

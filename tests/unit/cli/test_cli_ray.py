"""Tests the parts of ``up`` on Ray that need no Ray: the spec made of a plan, reports of status, option conflicts."""

from __future__ import annotations

import importlib.util
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from overfill.cli import up
from overfill.cli.main import main
from overfill.cli.ray_stack import RayOptions, RayStack, describe, failed, progress, spec_of
from overfill.cli.up_plan import StackRequest, make_plan
from overfill.cluster.spec import StackSpec
from overfill.settings.tiers import TierSpec

TWO_CORES = {"CPU": 2.0}


def plan(http: int | None = None, routers: int = 1, **settings: Any) -> Any:
    return make_plan(StackRequest(Path("pair"), 2, 3, routers, 7600, 1, settings, http or "off"))


def test_the_plans_settings_arrive_and_each_replica_is_left_its_own() -> None:
    made = spec_of(plan(dtype="float32", kv_memory="64MiB", grace_period="7", http=8000), RayOptions(), TWO_CORES)
    assert (made.prefill.replicas, made.decode.replicas) == (2, 3)
    assert made.worker_config("decode").kv_memory == 64 << 20
    assert made.worker_config("prefill").dtype == "float32"
    assert made.grace_period == 7
    assert (made.router.ports, made.router.http_ports) == ((7600,), (8000,))
    assert not {"worker_id", "routers", "port", "expect_decode"} & {*made.decode.settings, *made.router.settings}
    assert StackSpec.model_validate(made.model_dump(mode="json", exclude_defaults=True)) == made


def test_the_engine_of_each_stage_arrives() -> None:
    settings = {"engine_args": '{"enforce_eager": true}', "prefill_engine": "vllm", "decode_engine": "overfill"}
    made = spec_of(plan(**settings), RayOptions(), TWO_CORES)
    prefill, decode = made.worker_config("prefill"), made.worker_config("decode")
    assert (prefill.engine, prefill.engine_args) == ("vllm", '{"enforce_eager": true}')
    assert (decode.engine, decode.engine_args) == ("overfill", "")


def test_several_routers_have_a_port_each() -> None:
    made = spec_of(plan(routers=2, http=8000), RayOptions(), TWO_CORES)
    assert (made.router.replicas, made.router.ports, made.router.http_ports) == (2, (7600, 7601), (8000, 8001))


def test_on_this_machine_everything_fits_with_room_for_the_most_workers() -> None:
    made = spec_of(plan(), RayOptions(max_decode=8), TWO_CORES)
    assert (made.decode.replicas, made.decode.max_replicas_total) == (3, 8)
    assert made.router.num_cpus + 10 * made.decode.num_cpus <= 2
    assert made.prefill.num_gpus == 0


def test_gpus_of_this_machine_are_shared_and_those_of_a_cluster_are_asked_for() -> None:
    assert spec_of(plan(), RayOptions(), {"CPU": 32.0, "GPU": 2.0}).decode.num_gpus == pytest.approx(1 / 3)
    assert spec_of(plan(device="cpu"), RayOptions(), {"CPU": 32.0, "GPU": 2.0}).decode.num_gpus == 0
    joined = spec_of(plan(), RayOptions(address="auto", worker_gpus=1), {"CPU": 256.0, "GPU": 8.0})
    assert (joined.decode.num_gpus, joined.decode.num_cpus) == (1, 1)


def test_each_stage_reserves_for_its_own_threads_and_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OVERFILL_PREFILL_DEVICE", "cuda:1")
    monkeypatch.setenv("OVERFILL_DECODE_DEVICE", "cpu")
    monkeypatch.setenv("OVERFILL_DECODE_THREADS", "4")
    made = make_plan(StackRequest(Path("pair"), 2, 3))
    here = spec_of(made, RayOptions(), {"CPU": 32.0, "GPU": 2.0})
    assert (here.prefill.num_gpus, here.decode.num_gpus) == (1, 0), "only prefill workers share the GPUs"
    joined = spec_of(made, RayOptions(address="auto", worker_gpus=1), {"CPU": 256.0, "GPU": 8.0})
    assert (joined.prefill.num_gpus, joined.decode.num_gpus) == (1, 0)
    assert (joined.prefill.num_cpus, joined.decode.num_cpus) == (made.prefill[0].threads, 4)


def test_each_tier_is_a_pool_with_its_own_bounds_device_and_settings() -> None:
    tiers = ("full=p,device=cuda,fallback=fast", "fast=q:2,max=6,device=cpu,quantize=int8,itl-objective=0.05")
    request = StackRequest(None, tiers=tuple(map(TierSpec.parse, tiers)), settings={"brownout": "full > fast"})
    made = spec_of(make_plan(request), RayOptions(), {"CPU": 8.21, "GPU": 2.0})
    full, fast = made.decoders["full"], made.decoders["fast"]
    assert (full.pair, full.fallback, full.replicas, full.max_replicas, full.num_gpus) == ("p", "fast", 1, None, 1)
    assert (fast.pair, fast.replicas, fast.max_replicas, fast.num_gpus, fast.itl_objective) == ("q", 2, 6, 0, 0.05)
    assert full.num_cpus == 1, "8 CPUs for at most 8 workers"
    assert made.worker_config("decode-fast").quantize == "int8"
    assert made.router_config().brownout == ("full", "fast")
    assert StackSpec.model_validate(made.model_dump(mode="json", exclude_defaults=True)) == made
    stack = RayStack(make_plan(request), RayOptions(), print)
    described = {pool.tier: stack.describe_workers(pool) for pool in stack.plan.pools if pool.tier}
    assert described == {"full": "1 on Ray", "fast": "2 to 6 on Ray"}


def test_workers_with_both_stages_are_a_deployment() -> None:
    request = StackRequest(Path("pair"), 0, 1, colocated=2, settings={"ttft_objective": 1})
    made = spec_of(make_plan(request), RayOptions(), {"CPU": 8.2, "GPU": 1.0})
    assert made.worker is not None
    assert (made.worker.replicas, made.prefill, made.decode.replicas) == (2, None, 1)
    assert made.worker.num_gpus == pytest.approx(1 / 3)
    assert made.worker.num_cpus == pytest.approx(2.66)
    assert made.worker_config("worker").ttft_objective == 1
    assert StackSpec.model_validate(made.model_dump(mode="json", exclude_defaults=True)) == made
    stack = RayStack(make_plan(request), RayOptions(), print)
    assert [stack.describe_workers(pool) for pool in stack.plan.pools] == ["2 on Ray", "1 on Ray"]
    tiers = tuple(TierSpec.parse(text, least=0) for text in ("a=p:0,itl-objective=0.05", "b=q:2"))
    made = spec_of(make_plan(StackRequest(None, 0, 0, tiers=tiers, colocated=1)), RayOptions(), TWO_CORES)
    assert [*made.pools] == ["router", "worker", "decode-b"]
    assert (made.worker_config("worker").tier, made.worker_config("worker").itl_objective) == ("a", 0.05)


def test_mock_workers_stay_mock_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OVERFILL_DECODE_ENGINE_ARGS", '{"step": 0.05}')
    made = spec_of(plan(engine="mock"), RayOptions(), TWO_CORES)
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
        (["--no-ray", "--address", "auto", "--name", "x"], "--no-ray conflicts with --address, --name"),
        (["--decode", "3", "--max-decode", "2"], "--max-decode 2 is less than --decode 3"),
        (["--address", "auto", "--device", "cuda"], "--device cuda needs --worker-gpus with --address"),
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
    assert main([command, "--pair", "/no/such/pair"]) == 1
    err = capsys.readouterr().err
    assert "[server]'" in err
    assert "--no-ray" in err


def test_file_and_variable_can_choose_plain_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stacks: list[Any] = []
    monkeypatch.setattr(up, "run", lambda stack, stopping, console: stacks.append(stack) or 0)
    monkeypatch.setattr(up, "check_ports", lambda plan, metrics: None)
    monkeypatch.setattr(up, "check_engines", lambda plan, here: None)
    monkeypatch.setattr("overfill.pair.store.resolve_pair", lambda pair, report: Path(pair))
    file = tmp_path / "stack.yaml"
    file.write_text("up: {ray: no}")
    assert main(["up", "--pair", "p", "--config", str(file)]) == 0
    monkeypatch.setenv("OVERFILL_UP_RAY", "no")
    assert main(["up", "--pair", "p"]) == 0
    monkeypatch.delenv("OVERFILL_UP_RAY")
    assert main(["up", "--pair", "p"]) == 0
    assert [type(stack).__name__ for stack in stacks] == ["Stack", "Stack", "RayStack"]


def test_a_missing_cluster_is_reported_at_once(tiny_pair: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    assert (
        main(["up", "--engine", "mock", "--pair", str(tiny_pair), "--grpc", "0", "--address", f"127.0.0.1:{port}"]) == 1
    )
    assert f"no Ray cluster at 127.0.0.1:{port}" in capsys.readouterr().err

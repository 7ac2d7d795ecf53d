"""Tests ``up --colocated``: workers with both stages, what ``up`` chooses by itself, and what is refused."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from described import placed
from json_edits import edit

from overfill.cli import up
from overfill.cli.main import main
from overfill.cli.welcome import welcome
from overfill.process import gpus
from overfill.settings.config import ColocatedConfig
from overfill.settings.reader import BadSettings
from overfill.stack import counts as up_stages
from overfill.stack.placed import PlacedStack
from overfill.stack.process_runner import ProcessRunner

ONE = (1, 0, 0)
TWO = (0, 1, 1)


def plan(*tiers: str, **settings: Any) -> PlacedStack:
    """Places a stack of colocated workers, and of others that the arguments name."""
    return placed(*tiers, **({"pair": Path("/p"), "prefill": 0, "decode": 0, "colocated": 1} | settings))


def counts(made: PlacedStack) -> tuple[int, int, int]:
    return len(made.colocated), len(made.prefill), len(made.decode)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, with_vllm: Callable[[bool], None]) -> Callable[..., None]:
    """Sets the number of this machine's GPUs, and whether vLLM is installed. Without a call: none."""

    def have(number: int = 0, vllm: bool = False) -> None:
        monkeypatch.setattr(up_stages, "gpu_count", lambda: number)
        with_vllm(vllm)

    have()
    return have


@pytest.fixture
def started(
    machine: Callable[..., None], unchecked: list[PlacedStack], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., PlacedStack]:
    """Runs ``up`` with arguments and returns the plan that it would run."""
    monkeypatch.setattr(up, "require_vllm", lambda: None)
    monkeypatch.setattr("overfill.cli.up.resolve_pair", lambda pair, report: Path("/pairs") / pair)

    def start(*arguments: str) -> PlacedStack:
        assert main(["up", "--grpc", "0", "--http", "off", *arguments]) == 0
        return unchecked.pop()

    return start


def test_a_worker_with_both_stages_counts_in_both_and_has_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    made = plan(colocated=2, prefill=1, decode=2, routers=2, metrics_port="9600", kv_memory="64MiB")
    assert all((router.expect_prefill, router.expect_decode) == (3, 4) for router in made.routers)
    assert [worker.id for worker in made.workers] == ["colocated-0", "colocated-1", "prefill-0", "decode-0", "decode-1"]
    assert [worker.id for worker in made.of_stage("prefill")] == ["colocated-0", "colocated-1", "prefill-0"]
    assert [config.metrics_port for config in (*made.routers, *(w.config for w in made.workers))] == [
        *range(9600, 9607)
    ]
    threads = {worker.id: worker.config.threads for worker in plan(prefill=1, decode=3).workers}
    assert (threads["colocated-0"], threads["prefill-0"], threads["decode-0"]) == (2, 4, 2), "a share in each stage"
    assert [one.config.threads for one in plan().workers] == [8], "all cores"
    assert made.colocated[0].kv_memory == 64 << 20
    assert made.colocated[0].routers == made.join_addresses
    assert ColocatedConfig.of(made.colocated[0].settings()) == made.colocated[0]


def test_objectives_reach_workers_with_both_stages(started: Callable[..., PlacedStack], tmp_path: Path) -> None:
    (worker,) = started("--no-ray", "--ttft-objective", "1", "--itl-objective", "0.05").colocated
    assert (worker.ttft_objective, worker.itl_objective) == (1, 0.05)
    (worker,) = plan("a=p:0,itl-objective=0.02,quantize=int8", "b=q", ttft_objective=3).colocated
    assert (worker.ttft_objective, worker.itl_objective, worker.quantize) == (3, 0.02, "int8")


def test_a_format_that_only_some_workers_of_a_tier_would_have_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OVERFILL_DECODE_QUANTIZE", "int8")
    both = "OVERFILL_COLOCATED_QUANTIZE and OVERFILL_DECODE_QUANTIZE"
    with pytest.raises(
        BadSettings, match=rf"colocated workers have quantize \(default\), and decode workers have int8; .* {both}"
    ):
        plan(prefill=1, decode=1)
    with pytest.raises(BadSettings, match=both):
        plan("a=p:1", "b=q", prefill=1)
    assert plan("a=p:0", "b=q", prefill=1).decode[0].quantize == "int8", "no worker of the tier b has both stages"
    assert plan("a=p:1,quantize=none", prefill=1).tiers[0].quantize == "none", "the tier decides for all its workers"
    monkeypatch.setenv("OVERFILL_COLOCATED_QUANTIZE", "int8")
    assert [str(tier) for tier in plan(prefill=1, decode=1).tiers] == ["default=/p:2,quantize=int8"]
    monkeypatch.setenv("OVERFILL_COLOCATED_KV_CACHE_DTYPE", "int8")
    with pytest.raises(BadSettings, match="OVERFILL_COLOCATED_KV_CACHE_DTYPE and OVERFILL_DECODE_KV_CACHE_DTYPE"):
        plan(prefill=1, decode=1)


def test_drain_counts_the_requests_of_both_stages(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def entry(stage: str, running: int) -> Any:
        process = SimpleNamespace(load=SimpleNamespace(running=running, waiting=1))
        return SimpleNamespace(id="colocated-0", stage=stage, tier=None, revision="", process=process)

    def status(workers: Any) -> Any:
        return SimpleNamespace(workers=workers, several_tiers=False)

    both = (entry("prefill", 2), entry("decode", 3))
    states = [both, both, ()]
    drained: list[str] = []
    lines: list[str] = []
    client = SimpleNamespace(drain=drained.append, status=lambda: status(states.pop(0)))
    monkeypatch.setattr("overfill.cli.options.ClientConnection.client", lambda self: contextlib.nullcontext(client))
    monkeypatch.setattr("overfill.cli.drain._POLL", 0)
    monkeypatch.setattr("rich.status.Status.update", lambda self, line: lines.append(line))
    assert main(["drain", "colocated-0"]) == 0
    assert (drained, lines) == (["colocated-0"], ["colocated-0 is draining: 7 requests"])
    captured = capsys.readouterr()
    assert "colocated-0 has left" in captured.out
    assert "colocated-0 is the last prefill worker and the last decode worker: requests wait" in captured.err


def test_the_welcome_says_which_workers_have_both_stages() -> None:
    def said(made: PlacedStack) -> list[str]:
        text = welcome(made.spec, made.addresses, ProcessRunner(made, lambda name, line: None).describe_workers)
        return [line for line in text.splitlines() if "CPU threads each" in line]

    (line,) = said(plan(threads=2))
    assert line.split(maxsplit=1) == ["colocated", "colocated-0 (both stages, CPU threads each: 2)"]
    assert [line.split()[0] for line in said(plan(prefill=1, decode=1))] == ["colocated", "prefill", "decode"]
    _, prefill, decode = said(plan(prefill=1, decode=1, prefill_tensor_parallel_size="2", threads=3))
    assert prefill.endswith("(ranks each: 2, CPU threads each: 3)")
    assert decode.endswith("(CPU threads each: 3)")
    tier = said(plan("a=p", "b=q", threads=2))[0]
    assert "a (default): p: colocated-0 (both stages, CPU threads each: 2), decode-a-0 (CPU threads each: 2)" in tier


@pytest.mark.parametrize("stack", ["--ray", "--no-ray"])
def test_one_machine_gets_one_worker_and_up_says_why(
    stack: str, started: Callable[..., PlacedStack], capsys: pytest.CaptureFixture[str]
) -> None:
    assert counts(started(stack)) == ONE
    err = capsys.readouterr().err
    assert "one worker with both stages, which is fastest on one machine (docs/how-to/latency-or-throughput.md)" in err
    assert "--prefill 1 --decode 1" in err


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--prefill", "1"], TWO),
        (["--decode", "2"], (0, 1, 2)),
        (["--colocated"], ONE),
        (["--colocated", "--no-ray"], ONE),
        (["--colocated", "2"], (2, 0, 0)),
        (["--colocated=2"], (2, 0, 0)),
        (["--colocated", "0"], TWO),
        (["--colocated", "1", "--prefill", "1", "--decode", "2"], (1, 1, 2)),
        (["--colocated", "--decode", "1"], (1, 0, 1)),
        (["--colocated", "--engine", "mock"], ONE),
        (["--colocated", "--tensor-parallel-size", "1"], ONE),
        (["--tier", "a=p", "--tier", "b=q"], (0, 1, 2)),
        (["--colocated", "--tier", "a=p:0", "--tier", "b=q"], (1, 0, 1)),
    ],
)
def test_a_number_that_is_given_is_no_choice_of_up(
    arguments: list[str],
    expected: tuple[int, int, int],
    started: Callable[..., PlacedStack],
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert counts(started(*arguments)) == expected
    assert "docs/how-to/latency-or-throughput.md" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--engine", "mock"], "--engine mock is given"),
        (["--ray-address", "auto"], "--ray-address is given"),
        (["--max-decode", "3"], "--max-decode is given"),
        (["--prefill-engine", "overfill"], "--prefill-engine is given"),
        (["--engine", "vllm"], "vLLM runs each stage in a process of its own"),
        (["--tensor-parallel-size", "2"], "--tensor-parallel-size is 2"),
        (["--prefill-tensor-parallel-size", "2"], "--prefill-tensor-parallel-size is given"),
    ],
)
def test_what_is_for_one_stage_keeps_the_stages_apart(
    arguments: list[str], why: str, started: Callable[..., PlacedStack], capsys: pytest.CaptureFixture[str]
) -> None:
    assert counts(started(*arguments)) == TWO
    page = "docs/how-to/latency-or-throughput.md"
    said = f"one prefill and one decode worker, because {why} ({page}); for both stages in one worker, give --colocated"
    assert said in capsys.readouterr().err


def test_settings_of_one_stage_keep_the_stages_apart(
    started: Callable[..., PlacedStack],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "stack.toml"
    for text, expected in (
        ("[decode]\nkv-memory = '64MiB'", TWO),
        ("[common]\nengine = 'vllm'", TWO),
        ("[common]\nkv-memory = '64MiB'\n[colocated]\nthreads = 3", ONE),
    ):
        file.write_text(text)
        assert counts(started("--config", str(file))) == expected, text
    file.write_text("[colocated]\nthreads = 3")
    made = started("--config", str(file), "--colocated", "1", "--prefill", "1")
    assert (counts(made), made.colocated[0].threads) == ((1, 1, 0), 3)
    monkeypatch.setenv("OVERFILL_DECODE_THREADS", "3")
    assert counts(started()) == TWO
    assert "because OVERFILL_DECODE_THREADS is set" in capsys.readouterr().err
    assert main(["up", "--grpc", "0", "--http", "off", "--colocated", "3"]) == 2
    assert "OVERFILL_DECODE_THREADS: this stack has no decode workers" in capsys.readouterr().err
    monkeypatch.delenv("OVERFILL_DECODE_THREADS")
    file.write_text("[decode]\nkv-memory = '64MiB'")
    assert main(["up", "--grpc", "0", "--http", "off", "--colocated", "2", "--config", str(file)]) == 2
    assert f"{file}: decode.kv-memory: this stack has no decode workers" in capsys.readouterr().err


def test_settings_that_up_makes_itself_are_refused(
    tmp_path: Path, started: Callable[..., PlacedStack], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    for name in ("OVERFILL_PREFILL_PORT", "OVERFILL_DECODE_TIER", "OVERFILL_ROUTER_PAIR"):
        with monkeypatch.context() as patched:
            patched.setenv(name, "7")
            assert main(["up", "--grpc", "0", "--http", "off", "--prefill", "1"]) == 2
        assert f"{name}: `overfill up` sets this for each process itself" in capsys.readouterr().err
    file = tmp_path / "overfill.toml"
    file.write_text("[decode]\nworker-id = 'a'")
    assert main(["up", "--grpc", "0", "--http", "off", "--config", str(file)]) == 2
    assert f"{file}: decode.worker-id: `overfill up` sets this" in capsys.readouterr().err
    file.write_text("[common]\npair = 'fast'\n[router]\nport = 7700")
    assert started("--config", str(file)).routers


@pytest.mark.parametrize(("half", "named"), [("full", "full model"), ("decoder", "decoder")])
def test_a_pair_that_vllm_cannot_run_gets_one_worker_on_overfills_engine(
    half: str,
    named: str,
    started: Callable[..., PlacedStack],
    machine: Callable[..., None],
    fresh: Callable[[], Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    machine(1, vllm=True)
    pair = fresh()
    edit(pair / "pair.json", lambda manifest: manifest[half].update(engines=["overfill"]))
    assert counts(started("--pair", str(pair))) == ONE
    said = f"one worker with both stages, on OverFill's own engine, because vLLM cannot run the pair's {named} (docs/"
    assert said in capsys.readouterr().err
    assert counts(started("--pair", str(pair), "--engine", "vllm")) == TWO, "it is refused, and not replaced"
    machine(2, vllm=True)
    assert counts(started("--pair", str(pair))) == TWO
    machine(1, vllm=True)
    other = "full" if half == "decoder" else "decoder"
    edit(pair / "pair.json", lambda manifest: manifest[other].update(engines=["vllm"]))
    assert counts(started("--pair", str(pair))) == TWO, "OverFill's engine cannot run the other half"


def test_weights_that_are_quantised_on_load_are_not_for_vllm(
    started: Callable[..., PlacedStack],
    machine: Callable[..., None],
    fresh: Callable[[], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    machine(1, vllm=True)
    monkeypatch.setenv("OVERFILL_COLOCATED_QUANTIZE", "int8")
    assert counts(started("--pair", str(fresh()))) == ONE


def test_gpus_decide(
    started: Callable[..., PlacedStack], machine: Callable[..., None], fresh: Callable[[], Path]
) -> None:
    machine(1)
    assert counts(started()) == ONE
    machine(2)
    assert counts(started()) == TWO
    assert counts(started("--device", "cpu")) == counts(started("--device", "cuda:1")) == ONE
    machine(1, vllm=True)
    assert counts(started("--pair", str(fresh()))) == TWO, "auto is vLLM"
    assert counts(started("--engine", "overfill")) == counts(started("--device", "cpu")) == ONE
    assert counts(started("--device", "cuda:1")) == ONE, "vLLM takes the first GPU only"
    machine(0, vllm=True)
    assert counts(started()) == ONE


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--colocated", "--max-prefill", "2"],
            "--colocated conflicts with --max-prefill",
        ),
        (["--colocated", "--max-decode", "2"], "--colocated conflicts with --max-decode"),
        (["--colocated", "--tier", "a=p:2,max=3"], "--colocated conflicts with max of a --tier"),
        (["--colocated", "--engine", "vllm"], "for vLLM start a worker for each stage, as `overfill up --prefill 1"),
        (
            ["--colocated", "--prefill-engine", "vllm"],
            "--prefill-engine is for prefill workers",
        ),
        (["--colocated", "--decode-engine", "vllm"], "--decode-engine is for decode workers"),
        (["--prefill", "0"], "--prefill 0 leaves no worker that can prefill: give at least 1, or --colocated"),
        (["--decode", "0"], "--decode 0 leaves no worker that can decode"),
        (["--tier", "a=p:0"], "tiers.a.replicas: the number of decode workers must be at least 1"),
    ],
)
def test_what_workers_with_both_stages_cannot_have_is_refused(
    arguments: list[str], message: str, started: Callable[..., PlacedStack], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        raise SystemExit(main(["up", *arguments]))
    assert caught.value.code == 2
    assert message in " ".join(capsys.readouterr().err.replace("│", "").split())


def test_other_workers_may_have_another_engine() -> None:
    args = '{"enforce_eager": true}'
    made = plan(prefill=1, decode=1, prefill_engine="vllm", decode_engine="overfill", engine_args=args)
    assert [(worker.config.engine, worker.config.engine_args) for worker in made.workers] == [
        ("auto", ""), ("vllm", args), ("overfill", ""),
    ]  # fmt: skip
    with pytest.raises(BadSettings, match="--engine-args are for vLLM"):
        plan(engine_args=args)


def test_gpus_are_counted_without_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    devices, driver = tmp_path / "dev", tmp_path / "driver"
    devices.mkdir()
    monkeypatch.setattr(gpus, "_DEVICES", devices)
    monkeypatch.setattr(gpus, "_DRIVER", driver)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert gpus.gpu_count() == 0
    for name in ("0000:01:00.0", "0000:02:00.0", "0000:03:00.0"):
        (driver / name).mkdir(parents=True)
    assert gpus.gpu_count() == 3, "not used since the machine started"
    for name in ("nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm"):
        (devices / name).touch()
    assert gpus.gpu_count() == 2
    assert gpus.visible_gpus() == ["0", "1"]
    for visible, names in (
        ("1", ["1"]),
        ("1, 0", ["1", "0"]),
        ("0,1,2", ["0", "1"]),
        ("", []),
        ("-1", []),
        ("0,-1,1", ["0"]),
        ("GPU-8932f937", ["GPU-8932f937"]),
    ):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert gpus.visible_gpus() == names, visible
        assert gpus.gpu_count() == len(names), visible

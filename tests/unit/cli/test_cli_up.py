"""Tests ``up``: the processes and settings that it starts, when the stack is ready, and how it ends."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from described import described, placed
from json_edits import edit

from overfill.cli import up
from overfill.cli import welcome as welcome_module
from overfill.cli.main import main
from overfill.errors import InvalidRequest, UnsupportedModel
from overfill.process.extras import MissingExtra
from overfill.rpc import certificates
from overfill.rpc.access import Role
from overfill.settings.config import DecodeConfig, PrefillConfig
from overfill.stack import process_runner as stack_module
from overfill.stack import shared as shared_module
from overfill.stack.child import Child, StartFailed
from overfill.stack.describe import RayPlacement, threads_per_worker
from overfill.stack.placed import PlacedStack, place
from overfill.stack.ports import free_ports
from overfill.stack.process_runner import ProcessRunner, child_environment
from overfill.stack.spec import StackSpec

PATIENT = "import signal; print('up', flush=True); signal.pause()"


class RecordingStack(ProcessRunner):
    """A stack whose processes run the code given for their name. By default a process waits for a signal."""

    def __init__(self, code: dict[str, str] | None = None, **settings: Any) -> None:
        self.lines: list[tuple[str, str]] = []
        self.started: list[Child] = []
        self.configs: dict[str, Any] = {}
        self._code = code or {}
        super().__init__(place(described(**settings)), lambda name, line: self.lines.append((name, line)))

    def _spawn(self, name: str, module: str, config: Any, threads: int) -> Child:
        self.configs[name] = config
        command = [sys.executable, "-c", self._code.get(name, PATIENT)]
        child = Child(name, command, self._environment(name, config, threads), self._sink)
        self.started.append(child)
        return child

    def pid(self, name: str) -> int:
        return next(child.pid for child in self.started if child.name == name)


class Routers:
    """Stands in for the routers. It gives the answers of its script; None is a router that does not answer."""

    def __init__(self, answers: Callable[[], Any]) -> None:
        self._answers = answers
        self.asked: list[str] = []

    def __call__(self, address: str, shown: object) -> Any:
        self.asked.append(address)
        return self._answers()


def status(complete: bool, pid: int) -> Any:
    return SimpleNamespace(complete=complete, process=SimpleNamespace(pid=pid))


@pytest.fixture
def routers(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], Any]], Routers]:
    def install(answers: Callable[[], Any]) -> Routers:
        fake = Routers(answers)
        monkeypatch.setattr(stack_module, "router_status", fake)
        return fake

    return install


@pytest.fixture
def new_stack() -> Iterator[Callable[..., RecordingStack]]:
    made: list[RecordingStack] = []

    def make(*args: Any, **settings: Any) -> RecordingStack:
        made.append(RecordingStack(*args, **settings))
        return made[-1]

    yield make
    for stack in made:
        stack.stop()


def test_every_worker_joins_every_router_and_routers_expect_every_worker() -> None:
    made = placed(prefill=2, decode=3, routers=2, port=7600)
    assert [router.port for router in made.routers] == [7600, 7601]
    assert made.addresses == ("127.0.0.1:7600", "127.0.0.1:7601")
    assert all((router.expect_prefill, router.expect_decode) == (2, 3) for router in made.routers)
    assert [w.worker_id for w in made.prefill] == ["prefill-0", "prefill-1"]
    assert [w.worker_id for w in made.decode] == ["decode-0", "decode-1", "decode-2"]
    assert {worker.routers for worker in (*made.prefill, *made.decode)} == {made.addresses}


def test_routers_that_share_a_port_have_one_address_and_workers_join_each(tmp_path: Path) -> None:
    made = placed(routers=3, port=7600, http=8000, share_port=True)
    assert {(router.port, router.http) for router in made.routers} == {(7600, 8000)}
    assert len({router.share_port for router in made.routers}) == 1
    assert made.addresses == ("127.0.0.1:7600",)
    assert made.spec.openai_urls(made.addresses) == ("http://127.0.0.1:8000/v1",)
    assert len(set(made.join_addresses)) == 3
    assert {worker.routers for worker in (*made.prefill, *made.decode)} == {made.join_addresses}
    picked = placed(routers=2, http=0, share_port=True).routers
    assert len({port for router in picked for port in (router.port, router.http, router.join_port)}) == 4


def test_the_pair_is_found_from_any_folder() -> None:
    assert placed().decode[0].pair == str(Path.cwd() / "pair")


def test_cores_are_divided(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    assert [threads_per_worker(n) for n in (1, 2, 3, 8, 20)] == [8, 4, 2, 1, 1]
    made = placed(prefill=1, decode=3)
    assert (made.prefill[0].threads, made.decode[2].threads) == (8, 2)  # on one machine each stage may use all
    made = placed(prefill=1, decode=3, ray=RayPlacement(ray_address="auto"))
    assert (made.prefill[0].threads, made.decode[2].threads) == (2, 2)
    assert placed(threads=5).prefill[0].threads == 5
    made = placed(prefill=1, decode=2, engine="vllm", prefill_tensor_parallel_size="4")
    assert (made.prefill[0].threads, made.decode[0].threads) == (2, 4), "threads of a rank"
    made = placed(prefill=1, decode=2, ray=RayPlacement(ray_address="auto"), tensor_parallel_size="2", engine="vllm")
    assert (made.prefill[0].threads, made.decode[0].threads) == (1, 1)


def test_workers_with_more_threads_than_cores_share_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    stack = RecordingStack(prefill=1, decode=2)
    stack.start()
    found = {stack.configs[name].shared_cores for name in ("prefill-0", "decode-0", "decode-1")}
    file = found.pop()
    assert not found
    assert file.exists()
    stack.stop()
    assert not file.exists()

    stack = RecordingStack(prefill=1, decode=2, threads=2)
    stack.start()
    stack.stop()
    assert stack.configs["prefill-0"].shared_cores is None, "each worker has cores of its own"


def gpus_of(stack: RecordingStack) -> dict[str, str]:
    """Returns the GPUs that each process has printed. Waits until all have."""
    names = {child.name for child in stack.started}
    while not names <= dict(stack.lines).keys():
        assert all(child.returncode is None for child in stack.started)
        time.sleep(0.01)
    return {name: line for name, line in stack.lines if line != "up"}


@pytest.fixture
def on_gpus(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Returns a function that starts a stack on a machine with GPUs, whose processes print the GPUs that they see."""
    code = f"import os; print(os.environ.get('CUDA_VISIBLE_DEVICES'), flush=True); {PATIENT}"

    @contextlib.contextmanager
    def start(names: list[str], **settings: Any) -> Iterator[RecordingStack]:
        monkeypatch.setattr(shared_module, "visible_gpus", lambda: names)
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        stack = RecordingStack(**settings)
        stack._code = dict.fromkeys(["router-0", *(worker.id for worker in stack.placed.workers)], code)
        stack.start()
        try:
            yield stack
        finally:
            stack.stop()

    return start


def test_workers_take_the_gpus_in_turn(on_gpus: Callable[..., Any]) -> None:
    with on_gpus(["2", "GPU-7"], prefill=1, decode=2) as stack:
        assert [stack.configs[name].gpu_share for name in ("prefill-0", "decode-0", "decode-1")] == [0.5, 1, 0.5]
        assert gpus_of(stack) == {"router-0": "None", "prefill-0": "2", "decode-0": "GPU-7", "decode-1": "2"}
        old = stack.worker("decode-0")
        os.kill(old.pid, signal.SIGKILL)
        while old.returncode is None:
            time.sleep(0.01)
        stack.started.clear()
        stack.lines.clear()
        stack.restart("decode-0")
        assert gpus_of(stack) == {"decode-0": "GPU-7"}


@pytest.mark.parametrize(
    ("names", "settings"),
    [([], {}), (["0", "1"], {"engine": "mock"}), (["0", "1"], {"device": "cpu"}), (["0", "1"], {"device": "cuda:1"})],
)
def test_workers_that_choose_no_gpu_get_none(
    names: list[str], settings: dict[str, Any], on_gpus: Callable[..., Any]
) -> None:
    with on_gpus(names, **settings) as stack:
        assert set(gpus_of(stack).values()) == {"None"}


def shares(names: list[str], monkeypatch: pytest.MonkeyPatch, made: PlacedStack) -> dict[str, float | None]:
    monkeypatch.setattr(shared_module, "visible_gpus", lambda: names)
    shared, _ = shared_module.share_gpus(made)
    assert all(type(w.config).of(w.config.settings()) == w.config for w in shared.workers)
    return {worker.id: worker.config.gpu_share for worker in shared.workers}


def test_workers_of_one_gpu_share_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    assert shares(["0"], monkeypatch, placed()) == {"prefill-0": 0.5, "decode-0": 0.5}
    assert shares(["0", "1"], monkeypatch, placed(decode=2)) == {"prefill-0": 0.5, "decode-0": 1, "decode-1": 0.5}
    assert shares(["0"], monkeypatch, placed(prefill=0, decode=0, colocated=1)) == {"colocated-0": 1}
    assert shares([], monkeypatch, placed()) == shares(["0"], monkeypatch, placed(device="cpu"))
    assert set(shares(["0"], monkeypatch, placed(device="cpu")).values()) == {None}
    assert set(shares(["0", "1"], monkeypatch, placed(device="cuda:1")).values()) == {0.5}
    monkeypatch.setenv("OVERFILL_DECODE_GPU_SHARE", "0.7")
    assert shares(["0"], monkeypatch, placed()) == {"prefill-0": 0.5, "decode-0": 0.7}


@pytest.mark.parametrize(
    ("names", "settings", "expected"),
    [
        ("abcd", {"prefill_tensor_parallel_size": "2", "decode": 2}, ["ab", "c", "d"]),
        ("abcd", {"decode_tensor_parallel_size": "2"}, ["c", "ab"]),  # a wider worker's GPUs are neighbours
        (
            "abcdefgh",
            {"tensor_parallel_size": "2", "prefill_tensor_parallel_size": "4", "decode": 2},
            ["abcd", "ef", "gh"],
        ),
    ],
)
def test_each_rank_has_a_gpu(
    names: str, settings: dict[str, Any], expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_module, "visible_gpus", lambda: list(names))
    shared, visible = shared_module.share_gpus(placed(engine="vllm", **settings))
    assert [visible[worker.id] for worker in shared.workers] == [",".join(gpus) for gpus in expected]
    assert {worker.config.gpu_share for worker in shared.workers} == {1}


def test_ranks_share_gpus_with_other_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    made = placed(engine="vllm", decode=1, prefill_tensor_parallel_size="2")
    assert shares(["0", "1"], monkeypatch, made) == {"prefill-0": 0.5, "decode-0": 0.5}
    assert shared_module.share_gpus(made)[1] == {"prefill-0": "0,1", "decode-0": "0"}
    made = placed(engine="vllm", decode=2, prefill_tensor_parallel_size="2")
    assert shares(["0", "1"], monkeypatch, made) == {"prefill-0": 0.5, "decode-0": 0.5, "decode-1": 0.5}
    monkeypatch.setenv("OVERFILL_PREFILL_DEVICE", "cuda:0")  # its ranks take the first GPUs
    made = placed(engine="vllm", decode=2, prefill_tensor_parallel_size="2")
    assert shares(["0", "1", "2"], monkeypatch, made) == {"prefill-0": 0.5, "decode-0": 0.5, "decode-1": 0.5}


@pytest.mark.parametrize(
    ("gpus", "device", "refused"), [(2, "auto", True), (0, "cuda", True), (0, "auto", False), (2, "cpu", False)]
)
@pytest.mark.parametrize("runner", ["--ray", "--no-ray"])
def test_more_ranks_than_gpus_are_refused_before_anything_starts(
    gpus: int,
    device: str,
    refused: bool,
    runner: str,
    monkeypatch: pytest.MonkeyPatch,
    unchecked: list[PlacedStack],
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(up, "require_vllm", lambda: None)
    for module in ("stack.shared", "stack.describe", "stack.counts"):
        monkeypatch.setattr(f"overfill.{module}.gpu_count", lambda: gpus)
    flags = ["--engine", "vllm", "--tensor-parallel-size", "4", "--device", device]
    assert main(["up", runner, "--pair", "p", "--grpc", "0", "--http", "off", *flags]) == (1 if refused else 0)
    assert bool(unchecked) is not refused
    if refused:
        said = f"prefill: --tensor-parallel-size 4 needs a GPU for each rank, and this machine has {gpus} "
        assert said in capsys.readouterr().err


def test_the_size_of_a_stage_or_tier_replaces_that_of_all() -> None:
    made = described(engine="vllm", tensor_parallel_size="2", decode_tensor_parallel_size="4")
    assert {name: made.worker_config(name).tensor_parallel_size for name in made.pools} == {"prefill": 2, "decode": 4}
    tiers = ("a=p,tensor-parallel-size=1", "b=q")
    made = described(*tiers, decode_tensor_parallel_size="2", colocated=1)
    sizes = {"colocated": 1, "prefill": 1, "decode-a": 1, "decode-b": 2}
    assert {name: made.worker_config(name).tensor_parallel_size for name in made.pools} == sizes
    assert StackSpec.read(made.document()) == made


@pytest.mark.parametrize("ray", [None, RayPlacement(ray_address="auto")])
def test_all_workers_that_decode_get_the_folder_of_adapters(
    ray: RayPlacement | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path.parent)  # workers on Ray start elsewhere
    flags = {"adapters": tmp_path.name, "max_adapter_rank": "32"}
    made = described("a=p", "b=q,max-adapters=4", colocated=1, ray=ray, **flags)
    configs = {name: made.worker_config(name) for name in made.pools}
    assert not hasattr(configs.pop("prefill"), "adapters")
    assert {config.adapters for config in configs.values() if isinstance(config, DecodeConfig)} == {tmp_path}
    sizes = {name: (config.max_adapters, config.max_adapter_rank) for name, config in configs.items()}
    assert sizes == {"colocated": (8, 32), "decode-a": (8, 32), "decode-b": (4, 32)}
    assert StackSpec.read(made.document()) == made


@pytest.mark.parametrize("ray", [None, RayPlacement(ray_address="auto")])
def test_ranks_that_cannot_share_the_heads_are_refused(
    ray: RayPlacement | None, fresh: Callable[[], Path], with_vllm: Callable[[bool], None]
) -> None:
    with_vllm(True)
    made = described(pair=fresh(), ray=ray, device="cpu", engine="vllm", decode_tensor_parallel_size="3")
    with pytest.raises(
        InvalidRequest, match=r"tensor_parallel_size: 3 ranks cannot share the decoder, which has \d+ query"
    ):
        up.check_engines(made)


def test_variables_reach_the_workers_through_the_document_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OVERFILL_PREFILL_BLOCK_SIZE", "32")
    config = placed().prefill[0]
    environment = child_environment(os.environ, threads=3)
    assert "OVERFILL_PREFILL_BLOCK_SIZE" not in environment
    assert environment["OMP_NUM_THREADS"] == environment["MKL_NUM_THREADS"] == "3"
    monkeypatch.delenv("OVERFILL_PREFILL_BLOCK_SIZE")
    assert PrefillConfig.of(config.settings()) == config
    assert config.block_size == 32
    assert DecodeConfig.of(placed().decode[0].settings()).block_size is None


def test_free_ports_are_different_and_no_connection_gets_them() -> None:
    ports = free_ports("127.0.0.1", 5)
    assert len(set(ports)) == 5
    limits = Path("/proc/sys/net/ipv4/ip_local_port_range")
    if limits.exists():
        assert max(ports) < int(limits.read_text().split()[0])


@pytest.mark.parametrize(("grpc", "http"), [(7600, 7602), (7602, 7600), (0, 0)])
def test_neighbouring_ports_do_not_overlap(grpc: int, http: int) -> None:
    routers = placed(port=grpc, routers=2, http=http).routers
    assert len({port for router in routers for port in (router.port, router.http)}) == 4


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--max-num-seqs", "abc"), "'--max-num-seqs': must be a whole number of at least 1, got 'abc'"),
        (("--data-streams", "65"), "'--data-streams': must be a whole number from 1 to 64, got '65'"),
        (("--max-wait", "0"), "'--max-wait': must be a number above 0, got '0'"),
        (("--device", "gpu"), "'--device': must be auto, cpu, cuda or cuda:N, got 'gpu'"),
        (("--kv-memory", "5XB"), "'--kv-memory': must be a size such as 512MiB or 4GB, got '5XB'"),
        (("--metrics-port", "no"), "'--metrics-port': must be a whole number from 0 to 65535, or off, got 'no'"),
        (("--engine-args", "x"), "'--engine-args': expected a JSON object"),
        (("--brownout", "a"), "'--brownout': expected tiers from the best to the cheapest"),
        (("--brownout", "a > b"), "--brownout 'a > b' names tiers, and the stack has none: add --tier NAME=PAIR"),
        (("--default-tier", "a"), "--default-tier 'a' names tiers, and the stack has none: add --tier NAME=PAIR"),
    ],
)
def test_wrong_settings_are_reported_in_ups_own_name_before_the_pair_is_looked_for(
    arguments: tuple[str, ...], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["up", "--engine", "mock", "--pair", "/no/such/pair", *arguments]) == 2
    message = capsys.readouterr().err
    assert message.startswith("Usage: overfill up")
    assert says in message


def test_a_wrong_variable_of_a_service_is_reported_by_up(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OVERFILL_PREFILL_MAX_NUM_SEQS", "0")
    assert main(["up", "--engine", "mock", "--pair", "/no/such/pair"]) == 2
    message = capsys.readouterr().err
    assert message.startswith("Usage: overfill up")
    assert "OVERFILL_PREFILL_MAX_NUM_SEQS): must be a whole number of at least 1, got '0'" in message


def test_a_folder_of_logs_that_cannot_be_made_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    folder = str(tmp_path / "file" / "logs")
    assert main(["up", "--no-ray", "--engine", "mock", "--grpc", "0", "--http", "off", "--log-dir", folder]) == 2
    assert f"--log-dir {folder}: cannot be made: Not a directory" in capsys.readouterr().err


def test_the_error_for_an_open_host_lists_all_missing_options_of_up(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["up", "--no-ray", "--pair", "/no/such/pair", "--host", "0.0.0.0"]) == 2
    message = " ".join(capsys.readouterr().err.split())
    assert "give --tls FOLDER (`overfill certs FOLDER` makes it) and --api-keys FILE (`overfill keys create" in message


def test_a_stack_with_certificates_has_no_secret_that_only_this_machine_knows(
    tmp_path: Path, new_stack: Callable[..., RecordingStack]
) -> None:
    keys = {"api_keys": tmp_path / "keys.json"}
    certificates.make(tmp_path / "certs")
    for settings in (keys | {"tls": tmp_path / "certs"}, keys | {"tls_ca": tmp_path / "ca.crt"}, {}):
        assert not described(**settings).new_secret
        assert place(described(**settings)).routers[0].stack_secret is None
    stack = new_stack(**keys)
    stack.start()
    paths = {config.stack_secret for config in stack.configs.values()}
    secret = paths.pop()
    assert not paths
    assert len(secret.read_text(encoding="utf-8").strip()) == 64
    assert secret.parent.stat().st_mode & 0o77 == 0


def welcome(made: StackSpec, address: str = "") -> str:
    there = place(made)
    return welcome_module.welcome(there.spec, [address or there.addresses[0]], lambda pool: "1")


def test_the_command_that_is_shown_for_a_key_hides_it_from_other_users(tmp_path: Path) -> None:
    for name in ("keys.json", "secret"):
        (tmp_path / name).touch()
    made = described(api_keys=tmp_path / "keys.json", stack_secret=tmp_path / "secret")
    said = welcome(made)
    assert "OVERFILL_API_KEY=YOURS overfill status" in said
    assert "--api-key" not in said


def test_the_summary_of_a_rollout_names_the_pools_of_both_revisions() -> None:
    tiers = {"full": {"pair": "a"}, "fast": {"pair": "b"}}
    canary = {"revision": "r2", "tiers": {"full": {"pair": "c"}, "fast": {"pair": "d"}}, "percent": 5}
    said = welcome(StackSpec.read({"runner": "processes", "tiers": tiers, "canary": canary}))
    rows = [line.split()[:2] for line in said.splitlines()[2:8]]
    assert rows[0] == ["canary", "r2:"]
    assert [row[0] for row in rows[1:]] == ["prefill", "tier", "fast:", "prefill-r2", "decode-full-r2"]


def test_a_command_to_copy_is_one_line_and_curl_asks_for_a_short_answer() -> None:
    said = welcome(described(http=8000, served_model_name="mine,other"))
    (curl,) = [line for line in said.splitlines() if "curl" in line]
    words = shlex.split(curl)
    assert words[1] == "http://127.0.0.1:8000/v1/chat/completions"
    body = json.loads(words[words.index("-d") + 1])
    assert (body["model"], body["max_tokens"]) == ("mine", 256)
    urls = [line.split()[:2] for line in said.splitlines()[2:5]]
    assert urls == [
        ["OpenAI", "http://127.0.0.1:8000/v1"],
        ["Anthropic", "http://127.0.0.1:8000"],
        ["page", "http://127.0.0.1:8000/ui"],
    ]
    assert "curl" not in welcome(described())
    elsewhere = welcome(described(port=7600, routers=2, http=8000), address="10.0.0.7:7601")
    assert "http://10.0.0.7:8001/v1" in elsewhere, "on Ray, the router may run on another machine"
    assert '"model": "pair"' in welcome(described(http=8000))


def test_the_openai_endpoint_is_on_by_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unchecked: list[PlacedStack]
) -> None:
    def https(*arguments: str) -> list[object]:
        assert main(["up", "--no-ray", "--pair", "p", *arguments]) == 0
        return [router.http for router in unchecked.pop().routers]

    assert https("--router", "2") == [8000, 8000]
    assert main(["up", "--pair", "p", "--router", "2"]) == 0
    assert [router.http for router in unchecked.pop().routers] == [8000, 8001], "on Ray, each has its own"
    assert https("--http", "off") == ["off"]
    assert https("--http", "8100") == [8100]
    assert https("--http", "0")[0] not in (0, 8000, "off")
    file = tmp_path / "stack.yaml"
    file.write_text("router: {http: off}")
    assert https("--config", str(file)) == ["off"]
    monkeypatch.setenv("OVERFILL_ROUTER_HTTP", "8300")
    assert https() == https("--config", str(file)) == [8300]
    for wrong in ("on", "70000"):
        assert main(["up", "--http", wrong]) == 2
    monkeypatch.setenv("OVERFILL_ROUTER_PORT", "7700")
    assert main(["up", "--no-ray", "--pair", "p"]) == 0
    assert unchecked.pop().addresses == ("127.0.0.1:7700",)


@pytest.mark.parametrize(
    ("arguments", "variables", "pair"),
    [
        ([], {}, "default"),
        (["--engine", "mock"], {}, "mock"),
        (["--prefill-engine", "mock", "--decode-engine", "mock"], {}, "mock"),
        ([], {"OVERFILL_PREFILL_ENGINE": "mock", "OVERFILL_DECODE_ENGINE": "mock"}, "mock"),
        (["--engine", "mock", "identity"], {}, "identity"),
    ],
)
def test_without_a_pair_the_engine_chooses_it(
    arguments: list[str],
    variables: dict[str, str],
    pair: str,
    unchecked: list[PlacedStack],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert main(["up", "--no-ray", "--grpc", "0", "--http", "off", *arguments]) == 0
    assert unchecked.pop().spec.pair == pair


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--no-ray", "owner/model"], 1, "make a pair from it: overfill pair build --full owner/model "),
        (["--no-ray", "owner/model"], 1, "overfill pair import --full owner/model --decoder owner/model --out"),
        (["--engine", "mock", "--metrics-port", "9600"], 1, "on Ray, every process of a pool has the same"),
        (["--engine", "mock", "--decode-engine", "vllm"], 2, "got mock for prefill, vllm for decode"),
        (["--prefill-engine", "mock"], 2, "got mock for prefill, auto for decode"),
    ],
)
def test_what_cannot_start_is_refused_with_the_right_word(
    arguments: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["up", "--grpc", "0", "--http", "off", *arguments]) == code
    assert message in " ".join(capsys.readouterr().err.split())


def test_the_help_of_a_stack_shows_the_defaults_of_a_stack() -> None:
    text = " ".join(CliRunner().invoke(up.up_command, ["--help"], terminal_width=100).stdout.split())
    assert "[default: the cores, divided among the workers of a stage]" in text
    assert "is refused. [default: 64MiB]" in text
    assert "--tiers" not in text


@pytest.mark.parametrize("half", ["full", "decoder"])
@pytest.mark.parametrize("stack", ["--ray", "--no-ray"])
def test_a_pair_that_no_worker_runs_is_refused_before_anything_starts(
    half: str,
    stack: str,
    fresh: Callable[[], Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    started: list[object] = []
    monkeypatch.setattr(up, "run", lambda *arguments: started.append(arguments) or 0)
    pair = fresh()
    edit(pair / "pair.json", lambda manifest: manifest[half].update(engines=["vllm"]))
    arguments = ["up", stack, "--pair", str(pair), "--grpc", "0", "--http", "off"]
    assert main(arguments) == 1
    assert "the engine overfill cannot run the" in capsys.readouterr().err
    assert not started
    assert main([*arguments, "--engine", "mock"]) == 0
    assert len(started) == 1


def engines(made: PlacedStack) -> list[tuple[str, str]]:
    return [(worker.engine, worker.engine_args) for worker in (made.prefill[0], made.decode[0])]


def test_each_stage_may_have_its_own_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert engines(placed()) == [("auto", ""), ("auto", "")]
    assert engines(placed(engine="vllm")) == [("vllm", ""), ("vllm", "")]
    assert engines(placed(engine="vllm", decode_engine="overfill")) == [("vllm", ""), ("overfill", "")]
    file = tmp_path / "stack.yaml"
    file.write_text("prefill: {engine: vllm}")
    monkeypatch.setenv("OVERFILL_DECODE_ENGINE", "vllm")
    assert engines(placed(config=file)) == [("vllm", ""), ("vllm", "")]
    assert engines(placed(config=file, engine="overfill")) == [("overfill", ""), ("overfill", "")], "flags win"
    assert engines(placed(config=file, prefill_engine="overfill")) == [("overfill", ""), ("vllm", "")]


def test_arguments_of_vllm_go_to_the_stages_that_may_run_it() -> None:
    text = '{"enforce_eager": true}'
    assert engines(placed(engine="vllm", engine_args=text)) == [("vllm", text), ("vllm", text)]
    assert engines(placed(engine_args=text, decode_engine="overfill")) == [("auto", text), ("overfill", "")]
    assert engines(placed(engine_args=text, prefill_engine="overfill", decode_engine="overfill")) == [
        ("overfill", text),
        ("overfill", text),
    ], "they are left in, to be refused"


@pytest.mark.parametrize("flag", ["--engine", "--prefill-engine", "--decode-engine"])
def test_vllm_is_refused_where_it_is_not_installed_before_the_pair_is_looked_for(
    flag: str, with_vllm: Callable[[bool], None], capsys: pytest.CaptureFixture[str]
) -> None:
    with_vllm(False)
    assert main(["up", "--no-ray", "--pair", "/no/such/pair", "--grpc", "0", "--http", "off", flag, "vllm"]) == 1
    err = capsys.readouterr().err
    assert "the engine vllm needs the extra overfill[vllm], which is not installed here" in err


@pytest.mark.parametrize(
    ("half", "flags", "refusal"),
    [
        ("full", ["--engine", "vllm"], "the engine vllm cannot run the full model"),
        ("decoder", ["--engine", "vllm"], "the engine vllm cannot run the decoder"),
        ("decoder", ["--engine", "vllm", "--decode-engine", "overfill"], None),
        ("full", ["--decode-engine", "vllm"], None),
        ("full", ["--engine-args", '{"enforce_eager": true}'], "--engine-args: are for vllm"),
        (
            "full",
            ["--tensor-parallel-size", "2"],
            "--tensor-parallel-size: 2 ranks need vllm, but the engine overfill runs",
        ),
    ],
)
def test_a_half_that_its_stages_engine_cannot_run_is_refused(
    half: str,
    flags: list[str],
    refusal: str | None,
    fresh: Callable[[], Path],
    with_vllm: Callable[[bool], None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with_vllm(True)
    started: list[object] = []
    monkeypatch.setattr(up, "run", lambda *arguments: started.append(arguments) or 0)
    pair = fresh()
    edit(pair / "pair.json", lambda manifest: manifest[half].update(engines=["overfill"]))
    arguments = ["up", "--no-ray", "--device", "cpu", "--pair", str(pair), "--grpc", "0", "--http", "off", *flags]
    assert main(arguments) == (0 if refusal is None else 2 if refusal.startswith("--") else 1)
    assert (refusal or "") in capsys.readouterr().err
    assert bool(started) == (refusal is None)


def test_on_a_joined_cluster_only_what_no_machine_could_run_is_refused(
    fresh: Callable[[], Path], with_vllm: Callable[[bool], None]
) -> None:
    with_vllm(False)
    pair = fresh()
    edit(pair / "pair.json", lambda manifest: manifest["decoder"].update(engines=["vllm"]))

    def made(**settings: Any) -> StackSpec:
        return described(pair=pair, ray=RayPlacement(ray_address="auto"), **settings)

    up.check_engines(made())
    up.check_engines(made(decode_engine="vllm"))
    with pytest.raises(UnsupportedModel, match="the engine overfill cannot run the decoder"):
        up.check_engines(made(engine="overfill"))


@pytest.mark.parametrize(("flag", "otherwise"), [("--grpc", "0"), ("--http", "off"), ("--metrics-port", "off")])
def test_a_port_in_use_is_reported_before_the_pair_is_looked_for(
    flag: str, otherwise: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        flags = {"--grpc": "0", "--http": "0", "--metrics-port": "0", flag: str(port)}
        words = [word for pair in flags.items() for word in pair]
        assert main(["up", "--no-ray", "--pair", "/no/such/pair", *words]) == 1
        err = " ".join(capsys.readouterr().err.split())
    assert f"port {port} of 127.0.0.1 is in use" in err
    assert otherwise in err
    (other,) = re.findall(rf"give {flag} (\d+)", err)
    assert int(other) != port


def test_ready_means_complete_and_our_own_router(
    new_stack: Callable[..., RecordingStack], routers: Callable[..., Routers]
) -> None:
    stack = new_stack()
    stack.start()
    own = stack.pid("router-0")
    script = [None, status(True, own + 1), status(False, own), status(True, own)]
    fake = routers(lambda: script.pop(0))
    stack.wait_ready(threading.Event())
    assert script == []
    assert fake.asked == [stack.placed.addresses[0]] * 4


def test_every_router_must_be_ready(new_stack: Callable[..., RecordingStack], routers: Callable[..., Routers]) -> None:
    stack = new_stack(routers=2)
    stack.start()
    script = [status(True, stack.pid("router-0")), status(True, stack.pid("router-1"))]
    fake = routers(lambda: script.pop(0))
    stack.wait_ready(threading.Event())
    assert fake.asked == list(stack.placed.addresses)


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"host": "127.0.0.2"}, r"router\.crt cannot be used at 127\.0\.0\.2: IP address mis.*2'; give .*tls_name"),
        ({"advertise": "[::2]:0"}, r"router\.crt cannot be used at ::2"),  # only workers have an address to announce
        ({"tls_ca": "router.key"}, r"cannot read the TLS CA certificate .*router\.key"),
        ({"tls_name": "overfill"}, r"router\.crt cannot be used at worker\.role\.overfill\.internal: .*role worker"),
    ],
)
def test_a_certificate_that_others_would_refuse_is_found_before_anything_starts(
    changed: dict[str, str], says: str, new_stack: Callable[..., RecordingStack], tmp_path: Path
) -> None:
    certificates.make(tmp_path)
    files = {"tls_cert": "router.crt", "tls_key": "router.key", "tls_ca": "ca.crt"}
    settings = changed | {key: str(tmp_path / changed.get(key, name)) for key, name in files.items()}
    stack = new_stack(**settings)
    with pytest.raises(StartFailed, match=says):
        stack.start()
    assert not stack.started


@pytest.mark.parametrize("says", [None, r"router\.crt cannot be used at router\.role\.overfill\.internal"])
def test_routers_and_workers_may_have_certificates_of_different_authorities(
    says: str | None, new_stack: Callable[..., RecordingStack], tmp_path: Path
) -> None:
    def files(own: str, role: Role, others: str) -> dict[str, Path | str]:
        mine = certificates.role_files(tmp_path / own, role)
        files = {"tls_cert": mine.cert, "tls_key": mine.key, "tls_ca": tmp_path / others / "ca.crt"}
        return {**files, "tls_name": "overfill"}

    for authority in ("routers", "workers"):
        certificates.make(tmp_path / authority)
    of_routers = files("routers", Role.ROUTER, "workers")
    of_workers = files("workers", Role.WORKER, "routers" if says is None else "workers")
    stack = new_stack()
    placed = stack.placed.with_configs(lambda worker: worker.config.model_copy(update=of_workers))
    stack.placed = replace(placed, routers=tuple(one.model_copy(update=of_routers) for one in placed.routers))
    with pytest.raises(StartFailed, match=says) if says else contextlib.nullcontext():
        stack.start()


def test_a_worker_that_dies_at_start_stops_everything_and_its_last_lines_are_shown(
    new_stack: Callable[..., RecordingStack], routers: Callable[..., Routers]
) -> None:
    routers(lambda: None)
    stack = new_stack({"decode-0": "raise SystemExit('the pair does not fit')"})
    with pytest.raises(StartFailed, match="decode-0 exited with status 1") as caught:
        up.run(stack, threading.Event())
    assert caught.value.__notes__ == ["  decode-0 | the pair does not fit"]
    assert all(child.returncode is not None for child in stack.started)


def wait_for_exit(pid: int) -> None:
    with contextlib.suppress(ChildProcessError):  # the process has been reaped already
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)


def test_a_worker_that_dies_later_is_reported_once_and_the_stack_stays_up(
    new_stack: Callable[..., RecordingStack], routers: Callable[..., Routers], capsys: pytest.CaptureFixture[str]
) -> None:
    stack = new_stack({"prefill-0": "import signal, sys; print('oh no', flush=True); signal.pause()"})
    routers(lambda: status(True, stack.pid("router-0")))
    stopping = Steps(
        [
            lambda: os.kill(stack.pid("prefill-0"), 9),
            lambda: wait_for_exit(stack.pid("prefill-0")),
            lambda: None,
            lambda: None,
        ]
    )
    assert up.run(stack, stopping) == 0
    out, err = capsys.readouterr()
    assert f"--address {stack.placed.addresses[0]}" in out
    assert err.count("prefill-0 (pid") == 1
    assert "SIGKILL" in err
    assert "continues without it" in err
    assert all(child.returncode is not None for child in stack.started)


def test_without_a_router_the_stack_ends(
    new_stack: Callable[..., RecordingStack], routers: Callable[..., Routers], capsys: pytest.CaptureFixture[str]
) -> None:
    stack = new_stack()
    routers(lambda: status(True, stack.pid("router-0")))
    stopping = Steps(
        [
            lambda: os.kill(stack.pid("router-0"), 9),
            lambda: os.waitid(os.P_PID, stack.pid("router-0"), os.WEXITED | os.WNOWAIT),
            lambda: None,
        ]
    )
    assert up.run(stack, stopping) == 1
    assert "no router" in capsys.readouterr().err


def test_routers_drain_before_the_workers_are_asked_to_stop(new_stack: Callable[..., RecordingStack]) -> None:
    tell = (
        "import signal, sys, time\n"
        "def bye(*_):\n    print(time.monotonic_ns(), flush=True)\n    sys.exit(0)\n"
        "signal.signal(signal.SIGTERM, bye); print('up', flush=True)\nwhile True: signal.pause()"
    )
    names = ("router-0", "prefill-0", "decode-0")
    stack = new_stack(dict.fromkeys(names, tell))
    ready = threading.Semaphore(0)
    stack._sink = lambda name, line: (stack.lines.append((name, line)), ready.release())  # type: ignore[assignment]
    stack.start()
    for _ in names:
        assert ready.acquire(timeout=60)
    assert stack.stop() == []
    times = {name: int(line) for name, line in stack.lines if line != "up"}
    assert times["router-0"] < min(times["prefill-0"], times["decode-0"])


class Steps(threading.Event):
    """An event that runs one step at each wait and is set after the last step."""

    def __init__(self, steps: list[Callable[[], Any]]) -> None:
        super().__init__()
        self._steps = steps

    def wait(self, timeout: float | None = None) -> bool:
        if not self._steps:
            self.set()
            return True
        self._steps.pop(0)()
        return False


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs Linux")
def test_a_full_disk_costs_the_lines_of_a_log_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "decode-0.log").symlink_to("/dev/full")
    with up._log_sink(tmp_path) as write:
        for name in ("decode-0", "decode-1"):
            write(name, "hello")
    assert (tmp_path / "decode-1.log").read_text(encoding="utf-8") == "hello\n"


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--colocated", "2"],
        ["--prefill", "1", "--decode", "2", "--kv-memory", "64MiB"],
        ["--tier", "a=p", "--tier", "b=q:2,quantize=int8,itl-objective=0.05"],
        ["--router", "2"],
    ],
)
@pytest.mark.parametrize("runner", ["--ray", "--no-ray"])
def test_what_is_started_is_what_was_printed(
    arguments: list[str],
    runner: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    unchecked: list[PlacedStack],
    capsys: pytest.CaptureFixture[str],
) -> None:
    got: list[StackSpec] = []
    monkeypatch.setattr(up, "ProcessRunner", lambda placed, sink: got.append(placed.spec))
    monkeypatch.setattr(up, "RayRunner", lambda spec, note: got.append(spec))
    monkeypatch.setattr(up, "run", lambda *arguments: 0)
    assert main(["up", runner, *arguments, "--dry-run"]) == 0
    printed = capsys.readouterr().out
    (tmp_path / "stack.yaml").write_text(printed, encoding="utf-8")
    assert main(["up", str(tmp_path / "stack.yaml")]) == 0
    assert main(["up", runner, *arguments]) == 0
    assert got[0] == got[1] == StackSpec.read(yaml.safe_load(printed))


@pytest.mark.parametrize(
    ("engine", "arguments", "message"),
    [
        ("mock", {"stpe": 1}, "--engine-args: stpe: Extra inputs are not permitted; the mock engine knows"),
        ("vllm", {"enforce_eagre": True}, "--engine-args: enforce_eagre is no argument of this vLLM's EngineArgs; did"),
        ("auto", {"model": "m"}, "--engine-args: model is set by --pair"),
        ("auto", {"tensor_parallel_size": 2}, "tensor_parallel_size is set by --tensor-parallel-size"),
        ("vllm", {"nnodes": 2}, "--engine-args: nnodes 2 is not supported in this version; leave it at 1"),
        ("vllm", {"data_parallel_rank": 0}, "--engine-args: data_parallel_rank 0 is not supported in this version"),
        ("vllm", {"distributed_executor_backend": "ray"}, "distributed_executor_backend is set by OverFill"),
    ],
)
def test_a_dry_run_names_arguments_that_the_engine_does_not_have(
    engine: str,
    arguments: dict[str, Any],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "vllm" / "engine").mkdir(parents=True)
    (tmp_path / "vllm" / "__init__.py").write_text("raise ImportError")
    source = (
        "class EngineArgs:\n    model: str = 'm'\n    enforce_eager: bool = False\n    tensor_parallel_size: int = 1\n"
        "    nnodes: int = 1\n    data_parallel_rank: int | None = None\n"
        "    distributed_executor_backend: str | None = None\n"
    )
    (tmp_path / "vllm" / "engine" / "arg_utils.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    given = ["--prefill", "1", "--decode", "1", "--engine", engine, "--engine-args", json.dumps(arguments)]
    assert main(["up", "--no-ray", "--pair", "p", *given, "--dry-run"]) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_nothing_else_describes_a_stack_that_a_document_describes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "stack.yaml"
    file.write_text("pair: p\n", encoding="utf-8")
    assert main(["up", str(file), "--decode", "2"]) == 2
    assert "--decode has no effect" in capsys.readouterr().err
    monkeypatch.setenv("OVERFILL_DECODE_THREADS", "2")
    assert main(["up", str(file)]) == 2
    assert "OVERFILL_DECODE_THREADS has no effect" in capsys.readouterr().err


def test_plain_processes_of_a_document_for_a_cluster_are_checked_on_this_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing() -> None:
        raise MissingExtra("vLLM is not installed here")

    monkeypatch.setattr(up, "require_vllm", missing)
    file = tmp_path / "stack.yaml"
    text = "ray_address: auto\nrouter: {ports: [0]}\npair: p\nsettings: {engine: vllm}\nprefill: {num_gpus: 1}\n"
    file.write_text(text, encoding="utf-8")
    assert main(["up", str(file), "--no-ray"]) == 1
    assert "vLLM is not installed here" in capsys.readouterr().err

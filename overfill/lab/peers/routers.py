"""Starts other projects' routers on loopback, each with workers behind it: Dynamo, Shepherd (smg), vLLM's router."""

from __future__ import annotations

import http.client
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from overfill.lab.peers.environment import folder_of
from overfill.lab.peers.loopback import alone, beside, enter
from overfill.lab.peers.process import PeerFailed
from overfill.stack.child import Child, stop
from overfill.stack.ports import free_ports

MODEL = "mock"
"""Name of the model that each peer serves."""

_HOST = "127.0.0.1"
_START_SECONDS = 60.0
_GRACE = 5.0
_SPARE = 64
"""Sequences that workers take beyond those of a load, because ended ones leave a little later."""

_DYNAMO_STEP = 0.00574
"""Seconds of a decode step of Dynamo's mocker when its KV cache is nearly empty."""
_DYNAMO_PREFILL_SPEEDUP = 1000.0
"""With 0, which means no delay at all, its steps come in turns of 20 ms."""
_DYNAMO_BATCH = 1 << 24
"""Prompt tokens of a step: so many that no prompt waits for a second one."""
_DYNAMO_BLOCKS = 1_000_000
"""KV blocks of the mocker: so many that the load hardly fills them, because a step takes longer with more KV."""


@dataclass(frozen=True, slots=True)
class RunningRouter:
    """A router that runs, with its workers.

    Attributes:
        address: ``host:port`` of its HTTP endpoint.
        about: What runs, in words: release, and what is behind it.
        router, workers: Their processes.
        network: A process in whose network namespace the router listens; None means that of this process.
        token: Text of each token; empty means that tokens differ, and that each event has one.
    """

    address: str
    model: str
    about: str
    router: tuple[int, ...]
    workers: tuple[int, ...] = ()
    network: int | None = None
    token: bytes = b""


@contextmanager
def dynamo(python: Path, model: Path, step: float, sequences: int) -> Iterator[RunningRouter]:
    """Starts Dynamo's front end with its mocker, in a network namespace: the mocker listens on all addresses.

    Args:
        model: Folder with tokenizer and configuration.
        step: Seconds between two tokens of an answer.
        sequences: Answers at a time.

    Raises:
        PeerFailed: It did not start, or no namespace can be made.
    """
    (port,) = free_ports(_HOST, 1)
    with tempfile.TemporaryDirectory(prefix="overfill-dynamo-") as folder:
        environment = {
            "DYN_DISCOVERY_BACKEND": "file",
            "DYN_FILE_KV": folder,
            "DYN_REQUEST_PLANE": "tcp",
            "DYN_EVENT_PLANE": "zmq",
            "DYN_LOG": "error",
            "HF_HUB_OFFLINE": "1",
            "HOME": folder,  # Dynamo caches models there
        }
        front = [str(python), "-m", "dynamo.frontend", "--http-host", _HOST, "--http-port", str(port)]
        mocker = [str(python), "-m", "dynamo.mocker", "--model-path", str(model), "--model-name", MODEL]
        mocker += ["--max-num-seqs", str(sequences + _SPARE), "--num-gpu-blocks-override", str(_DYNAMO_BLOCKS)]
        mocker += ["--max-num-batched-tokens", str(_DYNAMO_BATCH), "--speedup-ratio", str(_DYNAMO_PREFILL_SPEEDUP)]
        mocker += ["--decode-speedup-ratio", str(_DYNAMO_STEP / step / _DYNAMO_PREFILL_SPEEDUP)]
        with _Children(environment) as children:
            router = children.start("dynamo", alone("dynamo's mocker", front))
            _wait_for_namespace(router)
            workers = children.start("dynamo's mocker", beside(router, mocker))
            children.wait_until_it_answers(port, network=router)
            yield RunningRouter(
                f"{_HOST}:{port}", MODEL, f"{_release('dynamo', 'ai_dynamo')} before its mocker", processes(router),
                processes(workers), router,
            )  # fmt: skip


@contextmanager
def smg(python: Path, model: Path, step: float, sequences: int) -> Iterator[RunningRouter]:
    """Starts Shepherd's gateway before a mock worker that speaks vLLM's gRPC; only there does it tokenize.

    Arguments and errors are those of ``dynamo``.
    """
    port, metrics, behind = free_ports(_HOST, 3)
    worker = [str(python), str(Path(__file__).with_name("smg_worker.py")), str(behind), str(model), str(step)]
    gateway = [str(python), "-m", "smg", "launch", "--host", _HOST, "--port", str(port)]
    gateway += ["--worker-urls", f"grpc://{_HOST}:{behind}", "--policy", "round_robin", "--model-path", str(model)]
    gateway += [*_unlimited(sequences), "--prometheus-host", _HOST, "--prometheus-port", str(metrics)]
    gateway += ["--worker-startup-check-interval", "1", "--shutdown-grace-period-secs", "0", "--log-level", "error"]
    with _Children({}) as children:
        workers = children.start("smg's worker", worker)
        router = children.start("smg", gateway)
        children.wait_until_it_answers(port)
        about = f"{_release('smg', 'smg')} before a mock gRPC worker"
        yield RunningRouter(f"{_HOST}:{port}", MODEL, about, processes(router), processes(workers), token=b"~")


@contextmanager
def vllm_router(python: Path, behind: RunningRouter, sequences: int) -> Iterator[RunningRouter]:
    """Starts vLLM's router before the server ``behind``. It passes text on, and neither tokenizes nor detokenizes.

    Errors are those of ``dynamo``.
    """
    port, metrics = free_ports(_HOST, 2)
    command = [str(python), "-m", "vllm_router.launch_router", "--host", _HOST, "--port", str(port)]
    command += ["--worker-urls", f"http://{behind.address}", "--policy", "round_robin"]
    command += [*_unlimited(sequences), "--prometheus-host", _HOST, "--prometheus-port", str(metrics)]
    command += ["--worker-startup-check-interval", "1", "--log-level", "error"]
    with _Children({}) as children:
        router = children.start("vllm-router", command)
        children.wait_until_it_answers(port, behind.model)
        about = f"{_release('vllm-router', 'vllm_router')}, a proxy without tokenizer, before {behind.about}"
        yield RunningRouter(
            f"{_HOST}:{port}", behind.model, about, processes(router), behind.router, token=behind.token
        )


def processes(pid: int) -> tuple[int, ...]:
    """Returns a process and all its descendants."""
    return (pid, *(child.pid for child in psutil.Process(pid).children(recursive=True)))


def _unlimited(sequences: int) -> list[str]:
    return ["--max-concurrent-requests", str(2 * sequences + _SPARE), "--disable-retries", "--disable-circuit-breaker"]


def _release(peer: str, package: str) -> str:
    found = folder_of(peer).glob(f"lib/*/site-packages/{package}-*.dist-info")
    return " ".join([peer, *(path.name.removesuffix(".dist-info").split("-")[1] for path in found)])


def _wait_for_namespace(pid: int) -> None:
    deadline = time.monotonic() + _START_SECONDS
    ours = os.readlink("/proc/self/ns/net")
    while os.readlink(f"/proc/{pid}/ns/net") == ours and time.monotonic() < deadline:
        time.sleep(0.01)


class _Children:
    """Processes of one peer, which end together."""

    def __init__(self, environment: dict[str, str]) -> None:
        self._environment = {**os.environ, "PYTHONUNBUFFERED": "1", **environment}
        self._environment.pop("PYTHONPATH", None)
        self._children: list[Child] = []

    def __enter__(self) -> _Children:
        return self

    def __exit__(self, *error: object) -> None:
        stop(self._children, _GRACE)

    def start(self, name: str, command: Sequence[str]) -> int:
        self._children.append(Child(name, command, self._environment, lambda name, line: None))
        return self._children[-1].pid

    def wait_until_it_answers(self, port: int, model: str = MODEL, network: int | None = None) -> None:
        """Waits for an answer to a prompt, within the namespace of process ``network``."""
        with ThreadPoolExecutor(1, initializer=_stay if network is None else lambda: enter(network)) as thread:
            thread.submit(self._wait, lambda: _answers(port, model)).result()

    def _wait(self, ready: Callable[[], bool]) -> None:
        deadline = time.monotonic() + _START_SECONDS
        while not ready():
            for child in self._children:
                late = time.monotonic() > deadline
                if late or child.returncode is not None:
                    how = f"did not answer within {_START_SECONDS:g} s" if late else child.describe_exit()
                    failure = PeerFailed(f"{child.name} {how} during start-up")
                    for line in child.last_lines():
                        failure.add_note(line)
                    raise failure
            time.sleep(0.1)


def _stay() -> None:
    """Leaves the thread where it is."""


def _answers(port: int, model: str) -> bool:
    body = json.dumps({"model": model, "messages": [{"role": "user", "content": "Hello."}], "max_tokens": 1})
    try:
        with closing(http.client.HTTPConnection(_HOST, port, timeout=10)) as connection:
            connection.request("POST", "/v1/chat/completions", body, {"content-type": "application/json"})
            return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False

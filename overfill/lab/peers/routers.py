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
from typing import Any

import psutil

from overfill.lab.peers.environment import folder_of
from overfill.lab.peers.loopback import alone, beside, enter
from overfill.lab.peers.vllm_server import wait_ready
from overfill.stack.child import Child, stop
from overfill.stack.ports import free_ports

MODEL = "mock"
"""Name of the model that each peer serves."""

_HOST = "127.0.0.1"
_START_SECONDS = 60.0
_GRACE = 5.0
_DYNAMO_STEP = 0.00574
"""Seconds of a decode step of Dynamo's mocker when its KV cache is nearly empty."""
_DYNAMO_SPEEDUP = 1000
"""Of prompts. With 0, which means no delay at all, the mocker's steps come in turns of 20 ms."""
_DYNAMO_LIMITS = {"num-gpu-blocks-override": 1_000_000, "max-num-batched-tokens": 1 << 24}
"""So much KV that the load hardly fills it, since a step takes longer then; and no prompt waits for a second step."""


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
    token: bytes = b"~"


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
    front = [str(python), "-m", "dynamo.frontend", "--http-host", _HOST, "--http-port", str(port)]
    mocker = [str(python), "-m", "dynamo.mocker", "--model-path", str(model), "--model-name", MODEL]
    mocker += [f"--{name}={value}" for name, value in _DYNAMO_LIMITS.items()]
    mocker += ["--max-num-seqs", str(sequences), "--speedup-ratio", str(_DYNAMO_SPEEDUP)]
    mocker += ["--decode-speedup-ratio", str(_DYNAMO_STEP / step / _DYNAMO_SPEEDUP)]
    planes = {"DYN_DISCOVERY_BACKEND": "file", "DYN_REQUEST_PLANE": "tcp", "DYN_EVENT_PLANE": "zmq"}
    with tempfile.TemporaryDirectory(prefix="overfill-dynamo-") as folder:
        # It caches models at home.
        settings = {"DYN_FILE_KV": folder, "HOME": folder, "DYN_LOG": "error", "HF_HUB_OFFLINE": "1"}
        with _running(**planes, **settings) as start:
            router = start("dynamo", alone("dynamo's mocker", front))
            deadline = time.monotonic() + _START_SECONDS
            while os.path.samefile(f"/proc/{router}/ns/net", "/proc/self/ns/net") and time.monotonic() < deadline:
                time.sleep(0.01)
            workers = start("dynamo's mocker", beside(router, mocker), port, network=router)
            about = f"{_release('ai_dynamo')} before its mocker"
            yield _found(port, about, router, processes(workers), network=router, token=b"")


@contextmanager
def smg(python: Path, model: Path, step: float, sequences: int) -> Iterator[RunningRouter]:
    """Starts Shepherd's gateway before a mock worker that speaks vLLM's gRPC; only there does it tokenize.

    Arguments and errors are those of ``dynamo``.
    """
    port, behind = free_ports(_HOST, 2)
    worker = [str(python), str(Path(__file__).with_name("smg_worker.py")), str(behind), str(model), str(step)]
    gateway = _gateway(python, "smg", port, f"grpc://{_HOST}:{behind}", sequences)
    gateway += ["--model-path", str(model), "--shutdown-grace-period-secs", "0"]
    with _running() as start:
        workers = start("smg's worker", worker)
        router = start("smg", gateway, port)
        yield _found(port, f"{_release('smg')} before a mock gRPC worker", router, processes(workers))


@contextmanager
def vllm_router(python: Path, behind: RunningRouter, sequences: int) -> Iterator[RunningRouter]:
    """Starts vLLM's router before the server ``behind``. It passes text on, and neither tokenizes nor detokenizes.

    Errors are those of ``dynamo``.
    """
    (port,) = free_ports(_HOST, 1)
    with _running() as start:
        command = _gateway(python, "vllm_router.launch_router", port, f"http://{behind.address}", sequences)
        router = start("vllm-router", command, port)
        about = f"{_release('vllm_router')}, a proxy without tokenizer, before {behind.about}"
        yield _found(port, about, router, behind.router)


def processes(pid: int) -> tuple[int, ...]:
    """Returns a process and all its descendants."""
    return (pid, *(child.pid for child in psutil.Process(pid).children(recursive=True)))


def _found(port: int, about: str, router: int, workers: tuple[int, ...], **more: Any) -> RunningRouter:
    return RunningRouter(f"{_HOST}:{port}", MODEL, about, processes(router), workers, **more)


def _gateway(python: Path, module: str, port: int, worker: str, sequences: int) -> list[str]:
    """The arguments that smg and vLLM's router, which began as the same program, have in common."""
    (metrics,) = free_ports(_HOST, 1)
    command = [str(python), "-m", module, *(["launch"] if module == "smg" else [])]
    command += ["--host", _HOST, "--port", str(port), "--prometheus-host", _HOST, "--prometheus-port", str(metrics)]
    command += ["--worker-urls", worker, "--worker-startup-check-interval", "1", "--policy", "round_robin"]
    command += ["--max-concurrent-requests", str(2 * sequences), "--disable-retries", "--disable-circuit-breaker"]
    return [*command, "--log-level", "error"]


def _release(package: str) -> str:
    name = package.removeprefix("ai_").replace("_", "-")
    found = folder_of(name).glob(f"lib/*/site-packages/{package}-*.dist-info")
    return " ".join([name, *(path.name.removesuffix(".dist-info").split("-")[1] for path in found)])


@contextmanager
def _running(**settings: str) -> Iterator[Callable[..., int]]:
    """Yields a function that starts a process of a peer, and with a port waits for an answer there."""
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", **settings}
    environment.pop("PYTHONPATH", None)
    children: list[Child] = []

    def start(name: str, command: Sequence[str], port: int | None = None, network: int | None = None) -> int:
        children.append(Child(name, command, environment, lambda name, line: None))
        if port is not None:
            with ThreadPoolExecutor(1) as thread:
                if network is not None:
                    thread.submit(enter, network).result()
                thread.submit(wait_ready, children, _START_SECONDS, lambda: _answers(port)).result()
        return children[-1].pid

    try:
        yield start
    finally:
        stop(children, _GRACE)


def _answers(port: int) -> bool:
    body = json.dumps({"model": MODEL, "messages": [{"role": "user", "content": "Hello."}], "max_tokens": 1})
    try:
        with closing(http.client.HTTPConnection(_HOST, port, timeout=10)) as connection:
            connection.request("POST", "/v1/chat/completions", body, {"content-type": "application/json"})
            return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False

"""Starts other projects' routers on loopback, each with workers behind it: Dynamo, Shepherd (smg), vLLM's router.

A bare server, which is the lower bound of a router, starts in the same way.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import psutil

from overfill.lab.cpu_clock import family
from overfill.lab.peers.environment import python_of, version_of
from overfill.lab.peers.process import HOST, PeerFailed, Start, answers, peer_processes
from overfill.pair.store import MOCK, resolve_pair
from overfill.stack.ports import free_ports

MODEL = "mock"
"""Name of the model that each peer serves."""

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
        router, workers: Their processes, with all descendants.
        token: Text of each token; empty means that tokens differ, and that each event has one.
    """

    address: str
    model: str
    about: str
    router: tuple[int, ...]
    workers: tuple[int, ...] = ()
    token: bytes = b"~"


StartRouter = Callable[[float, int], AbstractContextManager[RunningRouter]]
"""Starts a router with its workers, as ``bare`` does."""


@contextmanager
def bare(step: float, sequences: int) -> Iterator[RunningRouter]:
    """Starts the bare server.

    Args:
        step: Seconds between two tokens of an answer.
        sequences: Maximum number of answers at a time, if the router has one.

    Raises:
        PeerFailed: It did not start.
    """
    with peer_processes() as start:
        port, process = _bare(start, step)
        yield RunningRouter(f"{HOST}:{port}", MODEL, "bare uvicorn", (process,))


def other_networks() -> list[str]:
    """Returns the names of the network devices besides loopback that are up."""
    return [name for name, device in psutil.net_if_stats().items() if device.isup and name != "lo"]


@contextmanager
def dynamo(step: float, sequences: int) -> Iterator[RunningRouter]:
    """Starts Dynamo's front end with its mocker, which listens on all addresses.

    Arguments and errors are those of ``bare``; PeerFailed is also raised if this machine is on another network.
    """
    if networks := other_networks():
        raise PeerFailed(f"dynamo's mocker would listen on {', '.join(networks)} too")
    python, model = _installed("dynamo"), resolve_pair(MOCK) / "model"
    (port,) = free_ports(HOST, 1)
    front = [python, "-m", "dynamo.frontend", "--http-host", HOST, "--http-port", str(port)]
    mocker = [python, "-m", "dynamo.mocker", "--model-path", str(model), "--model-name", MODEL]
    mocker += [f"--{name}={value}" for name, value in _DYNAMO_LIMITS.items()]
    mocker += ["--max-num-seqs", str(sequences), "--speedup-ratio", str(_DYNAMO_SPEEDUP)]
    mocker += ["--decode-speedup-ratio", str(_DYNAMO_STEP / step / _DYNAMO_SPEEDUP)]
    settings = {"DYN_DISCOVERY_BACKEND": "file", "DYN_REQUEST_PLANE": "tcp", "DYN_EVENT_PLANE": "zmq"}
    with tempfile.TemporaryDirectory(prefix="overfill-dynamo-") as folder:
        # It caches models at home.
        settings |= {"DYN_FILE_KV": folder, "HOME": folder, "DYN_LOG": "error", "HF_HUB_OFFLINE": "1"}
        with peer_processes(settings) as start:
            router = start("dynamo", front).pid
            workers = start("dynamo's mocker", mocker, partial(_answers, port)).pid
            about = f"dynamo {version_of('dynamo')} before its mocker"
            yield RunningRouter(f"{HOST}:{port}", MODEL, about, family(router), family(workers), token=b"")


@contextmanager
def smg(step: float, sequences: int) -> Iterator[RunningRouter]:
    """Starts Shepherd's gateway before a mock worker that speaks vLLM's gRPC; only there does it tokenize.

    Arguments and errors are those of ``bare``.
    """
    python, model = _installed("smg"), str(resolve_pair(MOCK) / "model")
    port, behind = free_ports(HOST, 2)
    gateway = _gateway("smg", ["smg", "launch"], port, f"grpc://{HOST}:{behind}", sequences)
    gateway += ["--model-path", model, "--shutdown-grace-period-secs", "0"]
    with peer_processes() as start:
        workers = start("smg's worker", [python, _script("smg_worker.py"), str(behind), model, str(step)]).pid
        router = start("smg", gateway, partial(_answers, port)).pid
        about = f"smg {version_of('smg')} before a mock gRPC worker"
        yield RunningRouter(f"{HOST}:{port}", MODEL, about, family(router), family(workers))


@contextmanager
def vllm_router(step: float, sequences: int) -> Iterator[RunningRouter]:
    """Starts vLLM's router before the bare server. It passes text on, and neither tokenizes nor detokenizes.

    Arguments and errors are those of ``bare``.
    """
    with peer_processes() as start:
        behind, worker = _bare(start, step)
        (port,) = free_ports(HOST, 1)
        module = ["vllm_router.launch_router"]
        command = _gateway("vllm-router", module, port, f"http://{HOST}:{behind}", sequences)
        router = start("vllm-router", command, partial(_answers, port)).pid
        about = f"vllm-router {version_of('vllm-router')}, a proxy without tokenizer, before bare uvicorn"
        yield RunningRouter(f"{HOST}:{port}", MODEL, about, family(router), (worker,))


STARTS: Mapping[str, StartRouter] = {"dynamo": dynamo, "smg": smg, "vllm-router": vllm_router}
"""Peer -> how it is started, once it is installed."""


def _installed(peer: str) -> str:
    python = python_of(peer)
    assert python is not None, peer
    return str(python)


def _script(name: str) -> str:
    return str(Path(__file__).with_name(name))


def _bare(start: Start, step: float) -> tuple[int, int]:
    """Starts the bare server. Returns its port and its process."""
    (port,) = free_ports(HOST, 1)
    command = [sys.executable, _script("bare_server.py"), str(port), str(step)]
    return port, start("the bare server", command, partial(_answers, port)).pid


def _gateway(peer: str, module: list[str], port: int, worker: str, sequences: int) -> list[str]:
    """The arguments that smg and vLLM's router, which began as the same program, have in common."""
    (metrics,) = free_ports(HOST, 1)
    command = [_installed(peer), "-m", *module]
    command += ["--host", HOST, "--port", str(port), "--prometheus-host", HOST, "--prometheus-port", str(metrics)]
    command += ["--worker-urls", worker, "--worker-startup-check-interval", "1", "--policy", "round_robin"]
    command += ["--max-concurrent-requests", str(2 * sequences), "--disable-retries", "--disable-circuit-breaker"]
    return [*command, "--log-level", "error"]


def _answers(port: int) -> bool:
    body = {"model": MODEL, "messages": [{"role": "user", "content": "Hello."}], "max_tokens": 1}
    return answers(port, "/v1/chat/completions", json.dumps(body))

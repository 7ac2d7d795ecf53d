"""Runs vLLM's own OpenAI server on loopback, from the environment that ``environment.py`` installs."""

from __future__ import annotations

import http.client
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

from overfill.lab.peers.process import PeerFailed
from overfill.stack.child import Child, stop
from overfill.stack.ports import free_ports

_START_SECONDS = 600.0  # vLLM compiles kernels at its first start
_POLL_SECONDS = 0.2
_GRACE = 20.0
_MAX_NUM_BATCHED_TOKENS = 2048


@contextmanager
def vllm_server(
    python: Path,
    model: Path,
    *,
    max_num_seqs: int,
    max_model_len: int,
    kv_memory: int,
    prefix_cache: bool,
) -> Iterator[str]:
    """Starts the server and yields its URL, including ``/v1``, once it answers. Call it on the main thread only.

    Each core of this process is bound to the engine. By default vLLM leaves one core for its HTTP server, which is half
    of a machine with two cores.

    Args:
        kv_memory: bytes of its KV cache.
        prefix_cache: whether vLLM keeps KV of prompts.

    Raises:
        PeerFailed: The server did not start.
    """
    host, (port,) = "127.0.0.1", free_ports("127.0.0.1", 1)
    # The entry point `vllm` needs a distribution of that name; the CPU build has another name.
    command = [str(python), "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
    command += ["--host", host, "--port", str(port), "--dtype", "bfloat16"]
    command += ["--enable-prefix-caching" if prefix_cache else "--no-enable-prefix-caching"]
    command += ["--max-model-len", str(max_model_len), "--max-num-seqs", str(max_num_seqs)]
    command += ["--max-num-batched-tokens", str(max(_MAX_NUM_BATCHED_TOKENS, max_model_len))]
    command += ["--disable-log-stats", "--disable-uvicorn-access-log"]
    command += ["--kv-cache-memory-bytes", str(kv_memory)]
    cores = sorted(os.sched_getaffinity(0))
    environment = os.environ | {
        "OMP_NUM_THREADS": str(len(cores)),
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)),
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_NO_USAGE_STATS": "1",
    }
    environment.pop("PYTHONPATH", None)
    environment.pop("VLLM_CPU_KVCACHE_SPACE", None)  # it would replace the argument
    # The server has child processes. It ends them on SIGTERM, but not when it is killed.
    server = Child("vllm's server", command, environment, lambda name, line: None, orphaned=signal.SIGTERM)
    try:
        wait_ready([server], _START_SECONDS, lambda: _is_healthy(host, port))
        yield f"http://{host}:{port}/v1"
    finally:
        stop([server], _GRACE)


def wait_ready(children: Sequence[Child], seconds: float, ready: Callable[[], bool]) -> None:
    """Waits until a server of some processes is ready.

    Raises:
        PeerFailed: A process exited, or the time is over. The notes hold the last lines of its output.
    """
    deadline = time.monotonic() + seconds
    while not ready():
        for child in children:
            if child.returncode is not None:
                failure = PeerFailed(f"{child.name} {child.describe_exit()} during start-up")
                for line in child.last_lines():
                    failure.add_note(line)
                raise failure
        if time.monotonic() > deadline:
            raise PeerFailed(f"{children[-1].name} did not answer within {seconds:g} s")
        time.sleep(_POLL_SECONDS)


def _is_healthy(host: str, port: int) -> bool:
    try:
        with closing(http.client.HTTPConnection(host, port, timeout=5)) as connection:
            connection.request("GET", "/health")
            return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False

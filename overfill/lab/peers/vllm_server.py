"""Runs vLLM's own OpenAI server on loopback, from the environment that ``environment.py`` installs."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from overfill.lab.peers.process import HOST, answers, peer_processes
from overfill.stack.ports import free_ports

_START_SECONDS = 600.0  # vLLM compiles kernels at its first start
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
    (port,) = free_ports(HOST, 1)
    # The entry point `vllm` needs a distribution of that name; the CPU build has another name.
    command = [str(python), "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
    command += ["--host", HOST, "--port", str(port), "--dtype", "bfloat16"]
    command += ["--enable-prefix-caching" if prefix_cache else "--no-enable-prefix-caching"]
    command += ["--max-model-len", str(max_model_len), "--max-num-seqs", str(max_num_seqs)]
    command += ["--max-num-batched-tokens", str(max(_MAX_NUM_BATCHED_TOKENS, max_model_len))]
    command += ["--disable-log-stats", "--disable-uvicorn-access-log"]
    command += ["--kv-cache-memory-bytes", str(kv_memory)]
    cores = sorted(os.sched_getaffinity(0))
    environment = {
        "OMP_NUM_THREADS": str(len(cores)),
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)),
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_KVCACHE_SPACE": None,  # it would replace the argument
    }
    with peer_processes(environment, _GRACE) as start:
        # The server has child processes. It ends them on SIGTERM, but not when it is killed.
        healthy = partial(answers, port, "/health")
        start("vllm's server", command, healthy, seconds=_START_SECONDS, orphaned=signal.SIGTERM)
        yield f"http://{HOST}:{port}/v1"

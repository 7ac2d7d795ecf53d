"""A stack under a calm load, watched by a Prometheus of its own: the source of the dashboards' pictures.

The load is far below the stack's capacity, so that every objective is met and no alert fires. Needs the program
``prometheus`` and a machine that does nothing else.
"""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from overfill.client import Client, SamplingParams
from overfill.errors import OverfillError
from overfill.lab.monitoring.prometheus import Prometheus, running_prometheus
from overfill.stack.ports import free_ports

RULES = Path(__file__).parents[2] / "helm/overfill/files/rules"
START = 600.0  # seconds that the stack may take to be ready; the first start also prepares the pair
FAMILIES = 6  # groups of prompts; those of a group begin alike, so that prefix caches find something
PREFIX_TOKENS, OWN_TOKENS, ANSWER_TOKENS = 64, 32, 24
VOCABULARY = 1000  # prompts consist of token ids below this one


@contextmanager
def calm_stack(folder: Path, pair: str, rate: float, seconds: float) -> Iterator[Prometheus]:
    """Start a stack of one prefill and two decode workers, and yield its Prometheus after ``seconds`` of load.

    Args:
        folder: where Prometheus keeps its data; must exist.
        pair: name or folder of the model pair.
        rate: requests per second, on average; arrivals are random (Poisson).
        seconds: duration of the load.

    Raises:
        FileNotFoundError: the program ``prometheus`` is missing.
        RuntimeError: the stack or Prometheus is not ready in time.
        OverfillError, OSError: a request failed.
    """
    grpc, http = free_ports("127.0.0.1", 2)
    command = [
        sys.executable, "-m", "overfill.cli.main", "up", "--no-ray", "--pair", pair, "--prefill", "1", "--decode", "2",
        "--threads", "1", "--max-model-len", "1024", "--grpc", str(grpc), "--http", str(http),
    ]  # fmt: skip
    with subprocess.Popen(command, stdout=sys.stderr) as stack:
        try:
            targets = _wait_ready(stack, f"127.0.0.1:{grpc}")
            with running_prometheus(folder, targets, sorted(RULES.glob("*.yml"))) as prometheus:
                _load(f"127.0.0.1:{grpc}", f"http://127.0.0.1:{http}/v1", rate, seconds)
                yield prometheus
        finally:
            stack.send_signal(signal.SIGTERM)


def _wait_ready(stack: subprocess.Popen[bytes], address: str) -> str:
    """Wait until three workers are ready; return the URL under which the router lists what Prometheus scrapes."""
    deadline = time.monotonic() + START
    with Client(address) as client:
        while stack.poll() is None and time.monotonic() < deadline:
            try:
                status = client.status()
                if sum(worker.process is not None for worker in status.workers) == 3:
                    return f"http://{status.process.metrics_address}/targets"
            except OverfillError:
                pass
            time.sleep(0.5)
    raise RuntimeError(f"the stack was not ready within {START:.0f} s")


def _load(address: str, url: str, rate: float, seconds: float) -> None:
    """Send requests at random times, every fourth one over HTTP, and wait for the last answer."""
    draw = random.Random(0)
    started, due = time.monotonic(), 0.0
    sent: list[Future[Any]] = []
    with Client(address) as client, ThreadPoolExecutor(32) as threads:
        model = client.models()[0].name
        while (due := due + draw.expovariate(rate)) < seconds:
            family = draw.randrange(FAMILIES)
            prompt = [5 + (family * 131 + i * 7) % VOCABULARY for i in range(PREFIX_TOKENS)]
            prompt += [5 + draw.randrange(VOCABULARY) for _ in range(OWN_TOKENS)]
            time.sleep(max(0.0, started + due - time.monotonic()))
            if len(sent) % 4:
                sampling = SamplingParams(max_tokens=ANSWER_TOKENS, ignore_eos=True)
                sent.append(threads.submit(client.generate, prompt, sampling=sampling))
            else:
                sent.append(threads.submit(_over_http, url, model, prompt))
    for done in sent:
        done.result()


def _over_http(url: str, model: str, prompt: list[int]) -> None:
    body = {"model": model, "prompt": prompt, "max_tokens": ANSWER_TOKENS, "ignore_eos": True}
    request = urllib.request.Request(
        f"{url}/completions", json.dumps(body).encode(), {"content-type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        response.read()

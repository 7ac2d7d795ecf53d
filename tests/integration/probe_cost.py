"""Measures what a pod's probes cost: CPU per minute with commands in the pod, and over HTTPS.

    python tests/integration/probe_cost.py [REPEATS]

Starts a decode worker on the mock engine with certificates and asks it REPEATS times by command, and 50 times as often
over HTTPS. The cost of a command is its own CPU time and the worker's, that of a request the worker's alone. The
kubelet's own part is not counted.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil
from charts import ROOT, pods, probe, render
from stacks import wait_until

from overfill.rpc import certificates
from overfill.rpc.access import Role
from overfill.stack.ports import free_ports

PATHS = {"readinessProbe": "/readyz", "livenessProbe": "/livez"}


def main(repeats: int) -> None:
    """Prints CPU seconds per probe, and per pod and minute at the chart's intervals."""
    (container,) = pods(render("values.yaml"))["decode"]["containers"]
    per_minute = {kind: 60 / container[kind]["periodSeconds"] for kind in PATHS}
    with TemporaryDirectory() as folder:
        certificates.make(Path(folder), roles=[Role.WORKER])
        own = certificates.role_files(Path(folder), Role.WORKER)
        grpc, port = free_ports("127.0.0.1", 2)
        tls = [f"--tls-cert={own.cert}", f"--tls-key={own.key}", f"--tls-ca={own.ca}"]
        command = [sys.executable, "-m", "services.decode.main", "--pair=mock", "--engine=mock", *tls]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        worker = subprocess.Popen([*command, f"--port={grpc}", f"--probe-port={port}"], env=environment)
        try:
            wait_until(lambda: _succeeds(port, "/readyz"), 300, "the worker is ready", pause=0.5)
            asks = [sys.executable, "-m", "overfill.cli.main", "health", *tls, "--tls-name=overfill"]
            address = f"--address=127.0.0.1:{grpc}"
            ways: dict[str, dict[str, Callable[[], object]]] = {
                kind: {
                    "command": lambda live=kind == "livenessProbe": subprocess.run(
                        [*asks, *["--live"] * live, address], check=True, env=environment, stdout=subprocess.DEVNULL
                    ),
                    "HTTPS": lambda path=path: probe("127.0.0.1", port, path, 60),
                }
                for kind, path in PATHS.items()
            }
            for way in ("command", "HTTPS"):
                count = repeats if way == "command" else 50 * repeats  # the kernel counts in steps of 10 ms
                cost = {kind: _cpu(ways[kind][way], worker.pid, count, way == "command") for kind in PATHS}
                total = sum(cost[kind] * per_minute[kind] for kind in PATHS)
                each = ", ".join(f"{kind} {1e3 * seconds:.2f} ms" for kind, seconds in cost.items())
                print(f"{way:8} {each}; per pod and minute {1e3 * total:.1f} ms ({100 * total / 60:.3f} % of a core)")
        finally:
            worker.kill()
            worker.wait()


def _succeeds(port: int, path: str) -> bool:
    try:
        return probe("127.0.0.1", port, path)[0] == 200
    except OSError:
        return False


def _cpu(ask: Callable[[], object], pid: int, repeats: int, own: bool) -> float:
    """Returns CPU seconds per call of ``ask``: of the process ``pid``, and with ``own`` of this one's children."""

    def used() -> float:
        children = resource.getrusage(resource.RUSAGE_CHILDREN)
        times = psutil.Process(pid).cpu_times()
        return times.user + times.system + (children.ru_utime + children.ru_stime if own else 0.0)

    before = used()
    for _ in range(repeats):
        ask()
    return (used() - before) / repeats


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 40)

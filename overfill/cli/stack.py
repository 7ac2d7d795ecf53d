"""A whole stack of plain processes on this machine: starts them, waits until they are ready, stops them in order.

It starts the services by module name and never imports them. It asks the routers through the SDK whether the stack is
complete.
"""

from __future__ import annotations

import contextlib
import errno
import os
import random
import socket
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from overfill.cli import processes
from overfill.cli.processes import Child
from overfill.client import Client, ClientTls
from overfill.errors import OverfillError
from overfill.process.cores import SIZE
from overfill.routing.tier import DEFAULT_TIER
from overfill.rpc.addresses import reachable, split_address
from overfill.settings.config import DecodeConfig, PrefillConfig, RouterConfig, ServiceConfig
from overfill.settings.environment import GRPC_ENVIRONMENT, SETTINGS, thread_pools
from overfill.settings.tiers import TierSpec

_POLL_SECONDS = 0.2
_NEAR = 100  # number of ports after a used one that are tried as a replacement
_MAX_CHOICE = 10_000  # number of ports among which free ones are chosen
_RANDOM = random.SystemRandom()  # two stacks that start at once choose different ports
_MARGIN_SECONDS = 2  # time after the grace period for a process to exit by itself


class StartFailed(OverfillError):
    """The stack did not start. The exception's notes have the last lines of the process that exited."""


@dataclass(frozen=True)
class StackPlan:
    """The processes of a stack, each with its complete settings. Routers have fixed ports, which they may share.

    Attributes:
        routers, prefill, decode: settings of each process.
        mock: the workers compute nothing (``services.mock``), and have settings of mock workers.
        operator_tls: TLS files with which ``overfill up`` calls the routers; None means the routers' own.
    """

    routers: tuple[RouterConfig, ...]
    prefill: tuple[PrefillConfig, ...]
    decode: tuple[DecodeConfig, ...]
    mock: bool = False
    operator_tls: ClientTls | None = None

    @property
    def tiers(self) -> tuple[TierSpec, ...]:
        """The tiers, the default one first. With one pair there is one, called "default"."""
        return self.routers[0].tiers

    @property
    def named_tiers(self) -> bool:
        """True if the user has named the tiers; False with one pair."""
        return any(worker.tier for worker in self.decode)

    def tier_workers(self, tier: str) -> tuple[DecodeConfig, ...]:
        """Returns the settings of a tier's decode workers."""
        return tuple(worker for worker in self.decode if (worker.tier or DEFAULT_TIER) == tier)

    @property
    def addresses(self) -> tuple[str, ...]:
        """gRPC addresses at which clients on this machine reach the routers: one if the routers share it."""
        return tuple(dict.fromkeys(f"{reachable(router.host)}:{router.port}" for router in self.routers))

    @property
    def join_addresses(self) -> tuple[str, ...]:
        """Address of each router process alone, at which workers join it."""
        return tuple(f"{reachable(router.host)}:{router.join_port or router.port}" for router in self.routers)

    def openai_urls(self, addresses: Sequence[str]) -> tuple[str, ...]:
        """Returns the base URLs of the OpenAI endpoints of the routers at these gRPC addresses, on any machine."""
        scheme = "http" if self.routers[0].tls_cert is None else "https"
        ports = {router.port: router.http for router in self.routers if router.http != "off"}
        places = map(split_address, addresses)
        return tuple(f"{scheme}://{host}:{ports[port]}/v1" for host, port in places if port in ports)

    @property
    def model(self) -> str:
        """Model name that clients request."""
        first = self.routers[0]
        return first.served_model_name[0] if first.served_model_name else Path(first.pair).name

    def workers(self) -> list[tuple[str, PrefillConfig | DecodeConfig]]:
        """Returns the settings of every worker with its stage."""
        return [*(("prefill", worker) for worker in self.prefill), *(("decode", worker) for worker in self.decode)]

    @property
    def client_tls(self) -> ClientTls | None:
        """TLS files with which ``overfill up`` calls the routers; None means no TLS."""
        return self.operator_tls or self.routers[0].client_tls()

    @property
    def secret(self) -> str | None:
        """The stack's secret, with which ``overfill up`` calls the routers; None without one."""
        shown = self.routers[0].credentials()
        return None if shown is None else shown.secret or None


class Stack:
    """Runs the processes of a plan, and calls ``sink`` with ``(process, line)`` for each line of their output.

    Args:
        prefixes: name of a process -> command prefix that starts it elsewhere, such as in a network namespace. None
            starts all processes here.
    """

    def __init__(
        self,
        plan: StackPlan,
        sink: Callable[[str, str], None],
        prefixes: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        self.plan = plan
        self._sink = sink
        self._prefixes = prefixes or {}
        self._cores: Path | None = None
        self._routers: list[Child] = []
        self._workers: list[Child] = []
        self._reported: set[str] = set()

    def start(self) -> None:
        """Starts every process, routers first. Raises StartFailed when a port is in use."""
        if not self._prefixes:  # the ports of another namespace cannot be tried from here
            check_ports(self.plan)
            self._cores = _shared_cores_file(self.plan)
        for index, config in enumerate(self.plan.routers):
            self._routers.append(self._spawn(f"router-{index}", "services.router.main", config, threads=1))
        self._workers += [self._spawn_worker(stage, worker) for stage, worker in self.plan.workers()]

    def wait_ready(self, cancelled: threading.Event) -> None:
        """Waits until every router has seen all its workers ready, or until ``cancelled`` is set.

        Raises:
            StartFailed: a process exited before.
        """
        waiting = list(zip(self._routers, self.plan.join_addresses, strict=True))
        while waiting and not cancelled.is_set():
            for child in self.exited():
                raise _start_failed(child)
            router, address = waiting[0]
            if self._complete(router, address):
                waiting.pop(0)
            else:
                cancelled.wait(_POLL_SECONDS)

    def worker(self, name: str) -> Child:
        """Returns the current process of the worker with this id."""
        return next(child for child in self._workers if child.name == name)

    def restart(self, name: str) -> None:
        """Starts a dead worker again with the same settings. Call it on the main thread, like ``start``."""
        old = self.worker(name)
        stage, config = next((s, w) for s, w in self.plan.workers() if w.worker_id == name)
        self._reported.discard(name)
        self._workers[self._workers.index(old)] = self._spawn_worker(stage, config)

    def exited(self) -> list[Child]:
        """Returns the processes that have exited since the last call."""
        new = [
            child
            for child in [*self._routers, *self._workers]
            if child.name not in self._reported and child.returncode is not None
        ]
        self._reported.update(child.name for child in new)
        return new

    @property
    def addresses(self) -> tuple[str, ...]:
        """gRPC addresses of the routers."""
        return self.plan.addresses

    def describe_workers(self, tier: str | None) -> str:
        """Returns the names of a tier's decode workers, as text; None means the prefill workers."""
        workers = self.plan.prefill if tier is None else self.plan.tier_workers(tier)
        return ", ".join(worker.worker_id for worker in workers)

    def news(self) -> list[str]:
        """Returns lines about changes since the last call."""
        return [_exit_report(child) for child in self.exited()]

    @property
    def reachable(self) -> bool:
        """True while at least one router runs."""
        return any(router.returncode is None for router in self._routers)

    def stop(self) -> list[Child]:
        """Drains the routers, then ends the workers. Returns the processes that had to be killed."""
        if self._cores is not None:
            self._cores.unlink(missing_ok=True)  # the workers keep it open
        grace = self.plan.routers[0].grace_period
        try:
            stragglers = processes.stop(self._routers, grace + _MARGIN_SECONDS)
            return stragglers + processes.stop(self._workers, grace + _MARGIN_SECONDS)
        except BaseException:  # interrupted: the user does not want to wait
            processes.stop(self._workers, 0)
            raise

    def _spawn_worker(self, stage: str, config: PrefillConfig | DecodeConfig) -> Child:
        module = f"services.mock {stage}" if self.plan.mock else f"services.{stage}.main"
        if self._cores is not None and config.shared_cores is None:
            config = config.model_copy(update={"shared_cores": self._cores})
        return self._spawn(config.worker_id, module, config, config.threads)

    def _spawn(self, name: str, module: str, config: ServiceConfig, threads: int) -> Child:
        """Starts a process. ``module`` follows ``-m`` and may include a first argument."""
        command = [*self._prefixes.get(name, ()), sys.executable, "-m", *module.split(), *config.to_argv()]
        return Child(name, command, child_environment(os.environ, threads), self._sink)

    def _complete(self, router: Child, address: str) -> bool:
        try:
            with Client(address, tls=self.plan.client_tls, api_key=self.plan.secret) as client:
                status = client.status()
        except OverfillError:
            return False
        return status.complete and status.process.pid == router.pid


def child_environment(environ: Mapping[str, str], threads: int) -> dict[str, str]:
    """Returns ``environ`` without the services' settings, which flags carry, and with ``threads`` per thread pool."""
    kept = {key: value for key, value in environ.items() if not key.startswith(SETTINGS)}
    return GRPC_ENVIRONMENT | kept | thread_pools(threads) | {"PYTHONUNBUFFERED": "1"}


def _shared_cores_file(plan: StackPlan) -> Path | None:
    """Creates the file of ``SharedCores``. Returns None if the workers' threads fit the cores all the same."""
    threads = [worker.threads for _, worker in plan.workers()]
    if plan.mock or sum(threads) <= len(os.sched_getaffinity(0)):
        return None
    descriptor, path = tempfile.mkstemp(prefix="overfill-cores-")
    os.ftruncate(descriptor, SIZE)
    os.close(descriptor)
    return Path(path)


def threads_per_worker(workers: int) -> int:
    """Returns an equal share of this machine's cores for each of ``workers``, which run at the same time."""
    return max(1, len(os.sched_getaffinity(0)) // workers)


def free_ports(host: str, count: int) -> list[int]:
    """Returns ports that are free now.

    If possible, the kernel gives none of them to a connection. A worker listens only after it has loaded its model,
    which takes minutes on a busy machine, and some connection would have got the port by then.
    """
    first = _first_ephemeral_port()
    choice = range(max(1024, first - _MAX_CHOICE), first)
    sockets: list[socket.socket] = []
    try:
        for port in _RANDOM.sample(choice, len(choice)):
            if len(sockets) == count:
                break
            with contextlib.suppress(OSError):
                sockets.append(_bind(host, port))
        while len(sockets) < count:
            sockets.append(_bind(host, 0))
        return [s.getsockname()[1] for s in sockets]
    finally:
        for s in sockets:
            s.close()


def _first_ephemeral_port() -> int:
    """The lowest port that the kernel gives to connections by itself."""
    try:
        return int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text(encoding="ascii").split()[0])
    except (OSError, ValueError):  # not Linux
        return 49152  # the standard's (RFC 6335)


def check_ports(plan: StackPlan, metrics: bool = True) -> None:
    """Raises StartFailed if a port of ``plan`` is in use, naming the port and the flag of ``up`` that changes it.

    Args:
        metrics: also check the metrics ports.
    """
    hosts = [(router.host, router.port) for router in plan.routers]
    _check_free("--grpc", hosts, "or 0 to pick free ports")
    hosts = [(router.host, router.http) for router in plan.routers if router.http != "off"]
    _check_free("--http", hosts, "or off to disable the OpenAI endpoint")
    processes = [*plan.routers, *plan.prefill, *plan.decode] if metrics else []
    hosts = [(process.metrics_host, process.metrics_port) for process in processes if process.metrics_port != "off"]
    _check_free("--metrics-port", hosts, "or 0 to pick free ports, or off")


def _check_free(flag: str, servers: Sequence[tuple[str, int]], otherwise: str) -> None:
    """Raises StartFailed if a port is in use. ``servers`` has host and port of each; port 0 means any free one."""
    for host, port in servers:
        try:
            _bind(host, port).close()
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise StartFailed(f"cannot listen on {host}:{port}: {error.strerror}; choose with {flag}") from error
            free = _free_run(host, servers[0][1], len(servers))
            raise StartFailed(
                f"port {port} of {host} is in use: stop the process that uses it, or give {flag} {free} ({otherwise})"
            ) from error


def _free_run(host: str, after: int, count: int) -> int:
    """Returns the first of ``count`` consecutive free ports after ``after``; 0 (pick any) if none are near."""
    for first in range(after + 1, min(after + _NEAR, 65536 - count)):
        with contextlib.suppress(OSError):
            for port in range(first, first + count):
                _bind(host, port).close()
            return first
    return 0


def _bind(host: str, port: int) -> socket.socket:
    host = host.strip("[]")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    s = socket.socket(family)
    try:
        # As servers do, so that connections in TIME_WAIT from an earlier run do not block the port.
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        s.bind((host, port))
    except OSError:
        s.close()
        raise
    return s


def _exit_report(child: Child) -> str:
    said = "".join(f"\n  {line}" for line in child.last_lines()[-5:])
    return (
        f"{child.name} (pid {child.pid}) {child.describe_exit()}; the stack continues without it. Plain processes are "
        "not restarted: start `overfill up` again, without --no-ray if Ray should restart workers. "
        f"Its last lines:{said}"
    )


def _start_failed(child: Child) -> StartFailed:
    lines = child.last_lines()
    silent = "" if lines else " without output"
    error = StartFailed(f"{child.name} {child.describe_exit()} during start-up{silent}")
    for line in lines:
        error.add_note(f"  {child.name} | {line}")
    return error

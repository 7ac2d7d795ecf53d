"""A whole stack of plain processes on this machine: starts them, waits until they are ready, stops them in order.

It starts the services by module name and never imports them. It asks the routers whether the stack is complete.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence

from overfill.process.held_folder import hold_folder
from overfill.rpc.addresses import announced, reachable, target_host
from overfill.rpc.tls import TlsError
from overfill.settings.config import ServiceConfig, WorkerConfig
from overfill.settings.environment import GRPC_ENVIRONMENT, thread_pools
from overfill.settings.reader import SETTINGS
from overfill.settings.worker_kinds import VARIABLE_PREFIXES
from overfill.stack.ask import router_status
from overfill.stack.child import Child, StartFailed, stop
from overfill.stack.placed import PlacedStack, PlacedWorker
from overfill.stack.ports import check_ports
from overfill.stack.shared import make_shared_folder, share_cores, share_gpus
from overfill.stack.spec import StackSpec

_POLL_SECONDS = 0.2
_MARGIN_SECONDS = 2  # time after the grace period for a process to exit by itself


class ProcessRunner:
    """Runs a stack as plain processes, and calls ``sink`` with ``(process, line)`` for each line of their output.

    Args:
        prefixes: name of a process -> command prefix that starts it elsewhere, such as in a network namespace. None
            starts all processes here.

    Attributes:
        placed: the processes; from the start on, with their shares of the machine.
    """

    def __init__(
        self,
        placed: PlacedStack,
        sink: Callable[[str, str], None],
        *,
        prefixes: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        self.placed = placed
        self._sink = sink
        self._prefixes = prefixes or {}
        self._held = contextlib.ExitStack()
        self._gpus: dict[str, str] = {}  # by the worker's id
        self._routers: list[Child] = []
        self._workers: list[Child] = []
        self._reported: set[str] = set()

    def start(self) -> None:
        """Starts every process, routers first.

        Raises:
            StartFailed: a port is in use, or a process has a certificate that the others would not accept.
        """
        if not self._prefixes:  # the ports of another namespace cannot be tried from here
            check_ports(self.spec)
        self._check_certificates()
        make_shared_folder(self.placed.folder, self.spec.new_secret)
        self._held.enter_context(hold_folder(self.placed.folder))
        if not self._prefixes:
            self.placed = share_cores(self.placed)
        self.placed, self._gpus = share_gpus(self.placed)
        for index, config in enumerate(self.placed.routers):
            self._routers.append(self._spawn(f"router-{index}", "services.router.main", config, threads=1))
        self._workers += map(self._spawn_worker, self.placed.workers)

    def wait_ready(self, cancelled: threading.Event) -> None:
        """Waits until every router has seen all its workers ready, or until ``cancelled`` is set.

        Raises:
            StartFailed: a process exited before.
        """
        waiting = list(zip(self._routers, self.placed.join_addresses, strict=True))
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
        self._reported.discard(name)
        self._workers[self._workers.index(old)] = self._spawn_worker(self.placed.worker(name))

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
    def spec(self) -> StackSpec:
        """The stack, with free ports where it named none."""
        return self.placed.spec

    @property
    def addresses(self) -> tuple[str, ...]:
        """gRPC addresses of the routers."""
        return self.placed.addresses

    def describe_workers(self, pool: str) -> str:
        """Returns the names of a pool's workers, as text."""
        return ", ".join(worker.id for worker in self.placed.workers if worker.pool == pool)

    def news(self) -> list[str]:
        """Returns lines about changes since the last call."""
        return [_exit_report(child) for child in self.exited()]

    @property
    def reachable(self) -> bool:
        """True while at least one router runs."""
        return any(router.returncode is None for router in self._routers)

    def stop(self) -> list[Child]:
        """Drains the routers, then ends the workers. Returns the processes that had to be killed."""
        grace = self.placed.routers[0].grace_period
        try:
            stragglers = stop(self._routers, grace + _MARGIN_SECONDS)
            return stragglers + stop(self._workers, grace + _MARGIN_SECONDS)
        except BaseException:  # interrupted: the user does not want to wait
            stop(self._workers, 0)
            raise
        finally:
            self._remove_folder()

    def _check_certificates(self) -> None:
        routers, workers = self.placed.routers, [worker.config for worker in self.placed.workers]
        for config in (*routers, *workers):
            advertise, callers = (config.advertise, routers) if isinstance(config, WorkerConfig) else ("", workers)
            host = announced(f"{reachable(config.host)}:0", advertise)
            caller = next(iter(callers), config)  # another process, because it may trust another authority
            try:
                config.check_certificate(caller.client_tls(), target_host(host))
            except TlsError as error:
                raise StartFailed(str(error)) from error

    def _remove_folder(self) -> None:
        shutil.rmtree(self.placed.folder, ignore_errors=True)
        self._held.close()

    def _spawn_worker(self, worker: PlacedWorker) -> Child:
        return self._spawn(worker.id, worker.kind.module, worker.config, worker.config.threads)

    def _spawn(self, name: str, module: str, config: ServiceConfig, threads: int) -> Child:
        """Starts a process. ``module`` follows ``-m`` and may include a first argument."""
        command = [*self._prefixes.get(name, ()), sys.executable, "-m", *self._program(name, module)]
        return Child(name, command, self._environment(name, config, threads), self._sink)

    def _program(self, name: str, module: str) -> list[str]:
        """Returns what follows ``python -m`` to start a process."""
        return module.split()

    def _environment(self, name: str, config: ServiceConfig, threads: int) -> dict[str, str]:
        """Returns the environment of a process. A worker that is started again gets the same GPU."""
        gpu = {"CUDA_VISIBLE_DEVICES": self._gpus[name]} if name in self._gpus else {}
        return child_environment(os.environ, threads) | config.environment() | gpu

    def _complete(self, router: Child, address: str) -> bool:
        status = router_status(address, self.placed.credentials)
        return status is not None and status.complete and status.process.pid == router.pid


def child_environment(environ: Mapping[str, str], threads: int) -> dict[str, str]:
    """Returns ``environ`` without the services' settings, and with ``threads`` per thread pool."""
    kept = {key: value for key, value in environ.items() if not key.startswith((*VARIABLE_PREFIXES, SETTINGS))}
    return GRPC_ENVIRONMENT | kept | thread_pools(threads) | {"PYTHONUNBUFFERED": "1"}


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


@contextlib.contextmanager
def running(placed: PlacedStack, sink: Callable[[str, str], None]) -> Iterator[ProcessRunner]:
    """Starts a stack, yields it once it is ready, and stops it at the end; ``sink`` is as of ``ProcessRunner``.

    Raises:
        StartFailed: a process exited.
    """
    stack = ProcessRunner(placed, sink)
    try:
        stack.start()
        stack.wait_ready(threading.Event())
        yield stack
    finally:
        stack.stop()

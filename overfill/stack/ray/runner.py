"""Runs a stack on Ray Serve, with the same interface as the runner of plain processes.

Both start the same document. Ray starts the processes, watches them and replaces lost ones.
"""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import threading
import time
from collections.abc import Callable
from typing import Any

from overfill.process.held_folder import hold_folder
from overfill.rpc.access import Role
from overfill.rpc.channel import open_sync_channel
from overfill.rpc.tls import Credentials
from overfill.stack.ask import router_status
from overfill.stack.child import StartFailed
from overfill.stack.placed import operator_tls, secret_of, shared_folder
from overfill.stack.ports import check_ports, fill_ports
from overfill.stack.ray.connection import RayConnection
from overfill.stack.shared import are_shared, make_shared_folder, new_file
from overfill.stack.spec import DRAIN_MARGIN, StackSpec
from overfill.v1 import admin_pb2, admin_pb2_grpc

_POLL = 0.2  # seconds between checks while waiting
_LOOK = 1.0  # seconds between checks of a running stack
_MARGIN = 5.0  # seconds for Ray to notice that a replica has exited
_ROOM_PATIENCE = 120.0  # seconds for an autoscaling cluster to add machines


class RayRunner:
    """Runs a stack as a Serve application, and calls ``report`` with a line about each change.

    Attributes:
        spec: the stack, with the ports of its routers from the start on.
    """

    def __init__(self, spec: StackSpec, report: Callable[[str], None]) -> None:
        self.spec = spec
        self._folder = shared_folder()
        self._held = contextlib.ExitStack()
        self._report = report
        self._cluster: RayConnection | None = None
        self._deployed = False
        self._seen: dict[str, str] = {}
        self._looked_at = 0.0
        self._reachable = True

    @property
    def addresses(self) -> tuple[str, ...]:
        """gRPC addresses of the routers."""
        from overfill.stack.ray import directory

        return tuple(directory.addresses(self.spec.name))

    def start(self) -> None:
        """Starts or joins Ray and deploys the application.

        Raises:
            StartFailed: a router's port is in use.
            NoRoom: the cluster started here is too small.
            RayUnavailable: Ray or the cluster is not available, an application of that name already runs, or other
                machines cannot read the stack's secret.
        """
        make_shared_folder(self._folder, self.spec.new_secret)
        show_logs = self.spec.log_dir is None
        if self.spec.ray_address is None:
            self._held.enter_context(hold_folder(self._folder))
            check_ports(self.spec)
            self._report("starting Ray on this machine")
            self._cluster = RayConnection.start_local(len(os.sched_getaffinity(0)), show_logs)
        else:
            self._cluster = RayConnection.join(self.spec.ray_address, show_logs)
            self._cluster.check_secret(self.spec)
        from overfill.stack.ray.application import serve_config  # imports numpy

        self.spec = spec = self._with_files(fill_ports(self.spec))
        if self._cluster.owned:
            self._cluster.check_room(spec)
        router = spec.router_config()
        objectives = {"ttft": router.ttft_objective, "itl": router.itl_objective}
        self._cluster.deploy(serve_config(spec, spec.name, objectives))
        self._deployed = True

    def wait_ready(self, cancelled: threading.Event) -> None:
        """Waits until every router has seen its workers ready, or until ``cancelled`` is set.

        Raises:
            StartFailed: the application could not be deployed, or does not fit on the cluster.
        """
        assert self._cluster is not None
        # On a cluster of our own, the replicas fit (``check_room``), and a busy machine only starts them slowly.
        no_room_after = math.inf if self._cluster.owned else time.monotonic() + _ROOM_PATIENCE
        reported = ""
        while not cancelled.is_set():
            status = self._cluster.status(self.spec.name)
            if status is not None:
                if reported != (reported := progress(status)) and reported:
                    self._report(reported)
                if failure := failed(status, time.monotonic() > no_room_after):
                    raise StartFailed(failure)
                if status.status.value == "RUNNING" and self._complete():
                    return
            cancelled.wait(_POLL)

    def _with_files(self, spec: StackSpec) -> StackSpec:
        """Returns ``spec`` with the files that its processes on this machine share."""
        threads = [spec.worker_config(name).threads for name, pool in spec.pools.items() for _ in range(pool.replicas)]
        if spec.ray_address is None and not spec.mock and are_shared(threads) and "shared_cores" not in spec.settings:
            shared = {**spec.settings, "shared_cores": str(new_file(self._folder))}
            spec = spec.model_copy(update={"settings": shared})
        return spec.with_secret(self._folder)

    def describe_workers(self, pool: str) -> str:
        """Returns the number of a pool's workers, as text. `overfill status` lists their names."""
        workers = self.spec.pools[pool]
        bounds = f"{workers.replicas}" if workers.max_replicas is None else f"{workers.replicas} to {workers.most}"
        return f"{bounds} on Ray"

    def news(self) -> list[str]:
        """Returns lines about changes since the last call."""
        if self._cluster is None or time.monotonic() - self._looked_at < _LOOK:
            return []
        self._looked_at = time.monotonic()
        try:
            status = self._cluster.status(self.spec.name)
        except Exception as error:  # Ray raises various exceptions
            self._reachable = self._cluster.alive()
            return [] if self._reachable else [f"Ray does not answer any more: {error}"]
        if status is None:
            self._reachable = False
            return [f"the application {self.spec.name} was removed from the cluster"]
        lines = []
        for name, state in describe(status).items():
            if self._seen.get(name, "") not in ("", state):
                lines.append(f"{name}: {state}")
            self._seen[name] = state
        return lines

    @property
    def reachable(self) -> bool:
        """True while the application runs."""
        return self._reachable

    def stop(self) -> list[Any]:
        """Drains the routers, removes the application, and ends the cluster if it was started here."""
        cluster = self._cluster
        if cluster is None:
            self._remove_folder()
            return []
        grace = self.spec.router_config().grace_period
        try:
            if self._deployed and cluster.alive():
                self._drain_routers(grace)
                if not cluster.remove(self.spec.name, grace + DRAIN_MARGIN + _MARGIN):
                    self._report(f"not all replicas of {self.spec.name} ended in time")
        finally:
            cluster.close()
            self._remove_folder()
        return []

    def _remove_folder(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)
        self._held.close()

    def _complete(self) -> bool:
        addresses = self.addresses
        return len(addresses) >= self.spec.router.replicas and all(self._router_complete(a) for a in addresses)

    def _router_complete(self, address: str) -> bool:
        status = router_status(address, self._credentials)
        return status is not None and status.complete

    @property
    def _credentials(self) -> Credentials:
        """What an operator shows the routers."""
        router = self.spec.router_config()
        return Credentials(operator_tls(self.spec) or router.client_tls(), secret_of(router) or "")

    def _drain_routers(self, grace: float) -> None:
        """Drains the routers first, so that running and queued requests finish while all workers are available."""
        for address in self.addresses:
            channel = open_sync_channel(address, self._credentials, role=Role.ROUTER)
            with channel, contextlib.suppress(Exception):  # a dead router has nothing to finish
                admin_pb2_grpc.AdminStub(channel).Drain(admin_pb2.DrainRequest(), timeout=5)
        deadline = time.monotonic() + grace + _MARGIN
        while self.addresses and time.monotonic() < deadline:
            time.sleep(_POLL)


def describe(status: Any) -> dict[str, str]:
    """Returns per deployment: its replicas by state, and Serve's message if it is unhealthy."""
    words = {}
    for name, deployment in status.deployments.items():
        states = {str(state).lower(): count for state, count in deployment.replica_states.items() if count}
        counts = ", ".join(f"{count} {state}" for state, count in sorted(states.items())) or "no replicas"
        unwell = deployment.status.value in ("UNHEALTHY", "DEPLOY_FAILED")
        words[name] = f"{counts}; {deployment.message.splitlines()[0]}" if unwell and deployment.message else counts
    return words


def progress(status: Any) -> str:
    """Returns the progress of a start in one line; empty before the first deployment."""
    return "; ".join(f"{name}: {words}" for name, words in sorted(describe(status).items()))


def failed(status: Any, patience_is_over: bool) -> str | None:
    """Returns why a start has failed, or None. A lack of resources is a failure only once ``patience_is_over``."""
    if status.status.value in ("DEPLOY_FAILED", "UNHEALTHY"):
        said = [status.message, *(d.message for d in status.deployments.values())]
        return "Ray Serve could not deploy the stack: " + "\n".join(text for text in said if text)
    for name, deployment in status.deployments.items():
        # Serve's message after half a minute; it names required and available resources.
        if patience_is_over and "to be scheduled" in deployment.message:
            return f"the {name} replicas do not fit on the cluster: {deployment.message}"
    return None

"""A stack on Ray Serve, with the same interface as one of plain processes (``stack.py``).

Both run the same plan. Ray starts the processes, watches them and replaces lost ones.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from overfill.cli.ports import check_ports
from overfill.cli.processes import StartFailed
from overfill.cli.shared_cores import share_cores
from overfill.cli.stack_plan import PlannedPool, StackPlan
from overfill.cli.up_tiers import max_workers
from overfill.client import Client
from overfill.cluster import placement
from overfill.cluster.connection import RayConnection
from overfill.cluster.spec import (
    APPLICATION,
    COLOCATED,
    DECODE,
    DRAIN_MARGIN,
    PREFILL,
    RouterSpec,
    StackSpec,
    TierPool,
)
from overfill.errors import OverfillError
from overfill.rpc.channel import open_sync_channel
from overfill.rpc.tls import Credentials
from overfill.settings.config import ServiceConfig, WorkerConfig
from overfill.settings.tiers import TierSpec
from overfill.v1 import admin_pb2, admin_pb2_grpc

_POLL = 0.2  # seconds between checks while waiting
_LOOK = 1.0  # seconds between checks of a running stack
_MARGIN = 5.0  # seconds for Ray to notice that a replica has exited
_ROOM_PATIENCE = 120.0  # seconds for an autoscaling cluster to add machines

# Fields set per replica; metrics_port too, unless it is off.
_OWN = {
    "pair", "port", "http", "worker_id", "routers", "expect_prefill", "expect_decode", "metrics_port", "tier",
    "decoders",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class RayOptions:
    """Options of a stack on Ray.

    Attributes:
        address: address of a cluster to join, as for ``ray.init``; None starts a cluster here.
        name: name of the Serve application.
        worker_cpus, worker_gpus: CPUs and GPUs that Ray reserves per worker; None means an equal share of this machine.
        max_prefill, max_decode: maximum number of workers of an autoscaled pool; None means a fixed number.
        log_dir: folder for one log file per replica; None prints the replicas' lines here.
    """

    address: str | None = None
    name: str = APPLICATION
    worker_cpus: float | None = None
    worker_gpus: float | None = None
    max_prefill: int | None = None
    max_decode: int | None = None
    log_dir: str | None = None


class RayStack:
    """Runs ``plan`` as a Serve application, and calls ``report`` with a line about each change."""

    def __init__(self, plan: StackPlan, options: RayOptions, report: Callable[[str], None]) -> None:
        self.plan = plan
        self._cores: Path | None = None
        self._options = options
        self._report = report
        self._cluster: RayConnection | None = None
        self._deployed = False
        self._seen: dict[str, str] = {}
        self._looked_at = 0.0
        self._reachable = True

    @property
    def addresses(self) -> tuple[str, ...]:
        """gRPC addresses of the routers."""
        from overfill.cluster import directory

        return tuple(directory.addresses(self._options.name))

    def start(self) -> None:
        """Starts or joins Ray and deploys the application.

        Raises:
            StartFailed: a router's port is in use.
            NoRoom: the cluster started here is too small.
            RayUnavailable: Ray or the cluster is not available, or an application of that name already runs.
        """
        options = self._options
        if options.address is None:
            check_ports(self.plan, metrics=False)  # replicas choose their metrics ports
            self.plan, self._cores = share_cores(self.plan)
            self._report("starting Ray on this machine")
            self._cluster = RayConnection.start_local(len(os.sched_getaffinity(0)), options.log_dir is None)
        else:
            self._cluster = RayConnection.join(options.address, options.log_dir is None)
        import ray

        from overfill.cluster.application import serve_config  # imports numpy

        spec = spec_of(self.plan, options, ray.cluster_resources())
        if self._cluster.owned:
            self._cluster.check_room(spec)
        router = self.plan.routers[0]
        objectives = {"ttft": router.ttft_objective, "itl": router.itl_objective}
        self._cluster.deploy(serve_config(spec, options.name, objectives))
        self._deployed = True

    def wait_ready(self, cancelled: threading.Event) -> None:
        """Waits until every router has seen its workers ready, or until ``cancelled`` is set.

        Raises:
            StartFailed: the application could not be deployed, or does not fit on the cluster.
        """
        assert self._cluster is not None
        since = time.monotonic()
        reported = ""
        while not cancelled.is_set():
            status = self._cluster.status(self._options.name)
            if status is not None:
                if reported != (reported := progress(status)) and reported:
                    self._report(reported)
                if failure := failed(status, time.monotonic() - since > _ROOM_PATIENCE):
                    raise StartFailed(failure)
                if status.status.value == "RUNNING" and self._complete():
                    return
            cancelled.wait(_POLL)

    def describe_workers(self, pool: PlannedPool) -> str:
        """Returns the number of a pool's workers, as text. `overfill status` lists their names."""
        minimum, maximum = len(pool.workers), _maximum(self.plan, pool, self._options)
        return f"{minimum} on Ray" if maximum is None else f"{minimum} to {maximum} on Ray"

    def news(self) -> list[str]:
        """Returns lines about changes since the last call."""
        if self._cluster is None or time.monotonic() - self._looked_at < _LOOK:
            return []
        self._looked_at = time.monotonic()
        try:
            status = self._cluster.status(self._options.name)
        except Exception as error:  # Ray raises various exceptions
            self._reachable = self._cluster.alive()
            return [] if self._reachable else [f"Ray does not answer any more: {error}"]
        if status is None:
            self._reachable = False
            return [f"the application {self._options.name} was removed from the cluster"]
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
            return []
        grace = self.plan.routers[0].grace_period
        try:
            if self._deployed and cluster.alive():
                self._drain_routers(grace)
                if not cluster.remove(self._options.name, grace + DRAIN_MARGIN + _MARGIN):
                    self._report(f"not all replicas of {self._options.name} ended in time")
        finally:
            cluster.close()
            if self._cores is not None:
                self._cores.unlink(missing_ok=True)
        return []

    def _complete(self) -> bool:
        addresses = self.addresses
        return len(addresses) >= len(self.plan.routers) and all(self._router_complete(a) for a in addresses)

    def _router_complete(self, address: str) -> bool:
        try:
            with Client(address, tls=self.plan.client_tls, api_key=self.plan.secret) as client:
                return client.status().complete
        except OverfillError:
            return False

    def _drain_routers(self, grace: float) -> None:
        """Drains the routers first, so that running and queued requests finish while all workers are available."""
        for address in self.addresses:
            channel = open_sync_channel(address, Credentials(self.plan.client_tls, self.plan.secret or ""))
            with channel, contextlib.suppress(Exception):  # a dead router has nothing to finish
                admin_pb2_grpc.AdminStub(channel).Drain(admin_pb2.DrainRequest(), timeout=5)
        deadline = time.monotonic() + grace + _MARGIN
        while self.addresses and time.monotonic() < deadline:
            time.sleep(_POLL)


def spec_of(plan: StackPlan, options: RayOptions, resources: dict[str, float]) -> StackSpec:
    """Returns the specification of ``plan`` on a cluster with ``resources``."""
    router = plan.routers[0]
    routers = RouterSpec(
        replicas=len(plan.routers),
        ports=tuple(config.port for config in plan.routers),
        http_ports=tuple(config.http for config in plan.routers if config.http != "off"),
        settings=_settings(router),
    )
    most = [(pool, _maximum(plan, pool, options) or len(pool.workers)) for pool in plan.pools]
    cpus, gpus = options.worker_cpus, options.worker_gpus
    if options.address is None:
        free = resources.get("CPU", 1.0) - routers.num_cpus * routers.replicas
        cpus = placement.share(free, sum(count for _, count in most)) if cpus is None else cpus
        on_gpus = sum(count for pool, count in most if _wants_gpu(pool.config))
        gpus = placement.gpu_share(resources.get("GPU", 0.0), on_gpus) if gpus is None and on_gpus else gpus

    def deployment(pool: PlannedPool) -> dict[str, Any]:
        return {
            "replicas": len(pool.workers),
            "max_replicas": _maximum(plan, pool, options),
            "num_cpus": float(pool.config.threads) if cpus is None else cpus,
            "num_gpus": gpus or 0.0 if _wants_gpu(pool.config) else 0.0,
            "settings": _settings(pool.config),
        }

    pools: dict[str, Any] = {} if plan.named_tiers else {"pair": router.pair}
    decoders: dict[str | None, dict[str, Any]] = {}
    for pool in plan.pools:
        if pool.kind.name == DECODE and plan.named_tiers:
            decoders[pool.tier] = deployment(pool)
        else:
            pools[pool.kind.name] = deployment(pool)
    if plan.named_tiers:  # only workers with both stages may decode in the default tier
        pools["decoders"] = {
            tier.name: _tier_pool(tier, decoders.get(tier.name, {"replicas": 0})) for tier in plan.tiers
        }
    return StackSpec(log_dir=options.log_dir, router=routers, **pools)


def _maximum(plan: StackPlan, pool: PlannedPool, options: RayOptions) -> int | None:
    """Returns the maximum number of a pool's workers; None if the number is fixed."""
    if pool.kind.name == COLOCATED:
        return None
    if pool.kind.name == PREFILL:
        return options.max_prefill
    (tier,) = (one for one in plan.tiers if one.name == pool.tier)
    return max_workers(tier) or options.max_decode


def _tier_pool(tier: TierSpec, pool: dict[str, Any]) -> TierPool:
    return TierPool(
        pair=tier.pair,
        fallback=tier.fallback,
        ttft_objective=tier.seconds("ttft-objective"),
        itl_objective=tier.seconds("itl-objective"),
        **pool,
    )


def _wants_gpu(worker: WorkerConfig) -> bool:
    return worker.device != "cpu"


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


def _settings(config: ServiceConfig) -> dict[str, Any]:
    settings = {name: value for name, value in config.settings().items() if name not in _OWN}
    return settings if config.metrics_port != "off" else {**settings, "metrics_port": "off"}

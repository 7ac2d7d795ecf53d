"""Replicas of Ray Serve: each runs one service, with its own gRPC server, in the replica's event loop.

Serve decides how many replicas run, checks their health and replaces them. Requests, tokens and KV never pass through
its handles. When a service has ended, drained or broken, its replica reports unhealthy and Serve replaces it.
"""

from __future__ import annotations

import asyncio
import importlib
import itertools
import logging
import os
import sys
from collections.abc import Callable, Coroutine
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from grpc_health.v1 import health_pb2, health_pb2_grpc
from ray import serve
from ray.util import get_node_ip_address

from overfill.errors import Unavailable
from overfill.pair.store import resolve_pair
from overfill.process import startup
from overfill.rpc.addresses import announced, instead_of_wildcard, is_loopback, target_host
from overfill.rpc.calls import checked_response
from overfill.rpc.channel import open_channel
from overfill.rpc.tls import ClientTls
from overfill.settings.config import ServiceConfig, WorkerConfig
from overfill.settings.worker_kinds import VARIABLE_PREFIXES
from overfill.stack.ray import directory
from overfill.stack.ray.policy import name_signals
from overfill.stack.spec import DRAIN_MARGIN, ROUTER, StackSpec, WorkerPlace, kind_of
from overfill.telemetry import logs

if TYPE_CHECKING:
    from services.router.app import Router

logger = logging.getLogger(__name__)

ROUTER_HEALTHY_AFTER_DRAIN = 30.0
"""Seconds for which a drained router still counts as healthy: the operator may be about to end the application."""

_PORT_POLL = 0.5  # seconds between attempts to bind a port that the previous router still uses


class Service(Protocol):
    """A service in a replica: ``Router`` or ``WorkerHost``."""

    @property
    def address(self) -> str: ...

    @property
    def draining(self) -> bool: ...

    def drain(self) -> None: ...


Ready = Callable[[Any], None]
"""Callback for the Service, which is called once it serves."""


class Replica:
    """Starts a service, reports its health, and drains it before Serve ends the replica."""

    healthy_after_drain = 0.0
    """Seconds for which the replica counts as healthy after its service has drained and ended."""

    _service: Service
    _address: str  # at which other processes reach the service
    _serving: asyncio.Task[Any]
    _ended_at: float
    _grace: float
    _tls: ClientTls | None

    async def start(self, config: ServiceConfig, run: Callable[[Ready], Coroutine[Any, Any, Any]]) -> None:
        """Starts ``run`` and returns when the service serves. Raises the error of ``run`` if it fails before.

        Raises:
            TlsError: the service's certificate does not name the address at which others reach it.
        """
        self._grace, self._tls = config.grace_period, config.client_tls()
        advertise = config.advertise if isinstance(config, WorkerConfig) else ""
        config.check_certificate(self._tls, target_host(self._reached_at(announced(f"{config.host}:0", advertise))))
        ready: asyncio.Future[Service] = asyncio.get_running_loop().create_future()
        self._serving = asyncio.create_task(run(ready.set_result))
        self._serving.add_done_callback(self._note_end)
        await asyncio.wait({ready, self._serving}, return_when=asyncio.FIRST_COMPLETED)
        if not ready.done():
            self._serving.result()
            raise RuntimeError("the service ended before it served; see its log")
        self._service = ready.result()
        self._address = self._reached_at(self._service.address)

    async def check_health(self) -> None:
        """Queries the service's own health service through its port. Raises if Serve should replace the replica."""
        if self._serving.done():
            self._serving.result()
            since_end = asyncio.get_running_loop().time() - self._ended_at
            if not self._service.draining or since_end >= self.healthy_after_drain:
                raise RuntimeError("the service has ended")
        elif not self._service.draining:
            await check_alive(self._address, self._tls)

    async def drain(self) -> None:
        """Drains the service and waits for its end. Other workers continue requests left after the grace period."""
        self._service.drain()
        try:
            await asyncio.wait_for(asyncio.shield(self._serving), self._grace + DRAIN_MARGIN)
        except TimeoutError:
            logger.warning("the service has not ended; exiting anyway, %.0f s after its drain began", self._grace)

    @staticmethod
    def _reached_at(address: str) -> str:
        return instead_of_wildcard(address, get_node_ip_address())

    def _note_end(self, serving: asyncio.Task[Any]) -> None:
        self._ended_at = asyncio.get_running_loop().time()


class WorkerReplica(Replica):
    """Runs a worker, which finds its routers through the application's directory."""

    async def __init__(self, deployment: str, spec: StackSpec) -> None:  # type: ignore[misc]
        context = serve.get_replica_context()
        place = WorkerPlace(
            id=f"{deployment}-{context.replica_tag}",
            routers=f"ray:///{context.app_name}",
            node_ip=get_node_ip_address(),
        )
        spec = await _prepared(spec, deployment, place.id)
        config = spec.worker_config(deployment, place)
        # Import here, so that only this replica's service is loaded, after Ray has set its environment variables.
        from overfill.engine.device import cpu_settings
        from services.loading import torch_threads

        self._cpu_settings = cpu_settings(torch_threads(config))
        self._cpu_settings.__enter__()  # for the life of the process
        service = importlib.import_module(kind_of(deployment).module)
        await self.start(config, lambda ready: service.serve(config, ready))

    async def __del__(self) -> None:
        """Serve awaits this method before it stops the replica."""
        with suppress(AttributeError):  # it never served
            await self.drain()


class RouterReplica(Replica):
    """Runs a router, which stays in the application's directory while it accepts requests."""

    healthy_after_drain = ROUTER_HEALTHY_AFTER_DRAIN

    async def __init__(self, spec: StackSpec, *pools: object) -> None:  # type: ignore[misc]
        """``pools`` only make the workers' deployments part of the application; the router does not call them."""
        context = serve.get_replica_context()
        self._application = context.app_name
        spec = await _prepared(spec, ROUTER, f"router-{context.replica_tag}")

        async def run(ready: Ready) -> None:
            router = await _listening_router(spec)
            startup.freeze()
            ready(router)
            await router.run()

        await self.start(spec.router_config(), run)
        self._reporting = asyncio.create_task(
            directory.keep_reported(self._application, self._address, lambda: not self._service.draining)
        )

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Returns each revision's signals, which Serve passes to the scaling policy (``overfill.stack.ray.policy``)."""
        router: Router = self._service  # type: ignore[assignment]
        now = asyncio.get_running_loop().time()
        signals: dict[str, float] = {}
        for core in router.cores:
            signals |= name_signals(core.signals.read(now), core.revision)
        return signals

    async def __del__(self) -> None:
        """Serve awaits this method before it stops the replica."""
        with suppress(AttributeError):  # it never served
            self._reporting.cancel()
            self._service.drain()
            await directory.withdraw(self._application, self._address)
            await self.drain()


async def _listening_router(spec: StackSpec) -> Router:
    """Starts a router on the first free port of ``spec`` and returns it.

    When no port is free, it logs one warning and tries again. Raises Unavailable when none becomes free in time.
    """
    from services.router.app import Router

    loop = asyncio.get_running_loop()
    # A draining predecessor keeps its port until its last request has finished.
    patience = spec.grace_period + DRAIN_MARGIN
    deadline = loop.time() + patience
    for attempt in itertools.count():
        router = Router(spec.router_config(attempt % len(spec.router.ports), get_node_ip_address()))
        try:
            await router.start()
            break
        except Unavailable as error:
            if loop.time() > deadline:
                raise
            if attempt == len(spec.router.ports) - 1:
                logger.warning(
                    "%s; the router retries for %.0f s. If another program uses the port, choose other ports with "
                    "--grpc and --http, or --http off", error, patience,
                )  # fmt: skip
            if attempt % len(spec.router.ports) == len(spec.router.ports) - 1:
                await asyncio.sleep(_PORT_POLL)
    return router


async def check_alive(address: str, tls: ClientTls | None) -> None:
    """Raises unless the process at ``address`` answers.

    It ignores readiness: a router without workers is not ready, but replacing it would not bring workers.
    """
    channel = open_channel(address, tls)
    try:
        stub = health_pb2_grpc.HealthStub(channel)
        await checked_response(stub.Check(health_pb2.HealthCheckRequest()), address)
    finally:
        await channel.close(None)


async def _prepared(spec: StackSpec, deployment: str, name: str) -> StackSpec:
    """Sets up the process for the replica ``name``; returns ``spec`` with folders of the pairs that it reads.

    A router reads the pairs of all tiers, and a worker one.
    """
    for variable in [variable for variable in os.environ if variable.startswith(VARIABLE_PREFIXES)]:
        del os.environ[variable]  # a replica's settings come from its arguments only
    config = spec.router_config() if deployment == ROUTER else spec.worker_config(deployment)
    handler = _log_handler(spec.log_dir, name)
    logs.configure(config.log_level, config.log_format, handler, each_request=config.log_requests)
    _keep_serve_local()
    with startup.once():
        read = spec.pairs if deployment == ROUTER else {config.pair}
        folders = {pair: str(await asyncio.to_thread(resolve_pair, pair)) for pair in read}
    return spec.with_pairs(lambda pair: folders.get(pair, pair))


def _keep_serve_local() -> None:
    """Makes Serve's own gRPC server in this replica listen on loopback if Ray does, instead of on all interfaces.

    Serve has no setting for this. Its server starts after the service, and OverFill sends nothing through it.
    """
    address = get_node_ip_address()
    if is_loopback(address):
        serve_replica: Any = importlib.import_module("ray.serve._private.replica")
        add = serve_replica.add_port_to_grpc_server
        serve_replica.add_port_to_grpc_server = lambda server, where: add(server, where.replace("[::]", address))


def _log_handler(folder: str | None, name: str) -> logging.Handler:
    if folder is None:
        return logging.StreamHandler(sys.stderr)
    Path(folder).mkdir(parents=True, exist_ok=True)
    return logging.FileHandler(Path(folder) / f"{name}.log", encoding="utf-8")

"""What runs in a Serve replica: one existing service, with its own gRPC server, in the replica's event loop.

Serve decides how many there are, looks after their health and replaces them; requests, tokens and KV never pass
through its handles. A service that has ended, drained or broken, makes its replica unhealthy, and so replaced.
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

from overfill.cluster import directory
from overfill.cluster.spec import DRAIN_MARGIN, PREFILL, ROUTER, StackSpec, WorkerPlace
from overfill.errors import Unavailable
from overfill.pair.store import resolve_pair
from overfill.process import startup
from overfill.rpc.addresses import is_loopback, split_address
from overfill.rpc.calls import checked_response
from overfill.rpc.channel import open_channel
from overfill.rpc.tls import ClientTls
from overfill.settings.config import ServiceConfig
from overfill.settings.environment import SETTINGS
from overfill.settings.values import is_wildcard
from overfill.telemetry import logs

if TYPE_CHECKING:
    from services.router.app import Router

logger = logging.getLogger(__name__)

DRAINED_STAYS = 30.0
"""Seconds that a drained router still counts as healthy: who drained it may be about to end the whole application."""

_PORT_POLL = 0.5  # seconds between tries to take a port that the router before us still has


class Service(Protocol):
    """What runs in a replica: ``Router``, ``WorkerHost`` or a mock worker."""

    @property
    def address(self) -> str: ...

    @property
    def draining(self) -> bool: ...

    def drain(self) -> None: ...


Ready = Callable[[Any], None]
"""To be called with the Service once it serves."""


class Replica:
    """Starts a service, answers for its health, and drains it when Serve wants the replica to go."""

    stays = 0.0
    """Seconds that the replica counts as healthy after its service was drained and has ended."""

    _service: Service
    _serving: asyncio.Task[Any]
    _ended_at: float
    _grace: float
    _tls: ClientTls | None

    async def start(self, config: ServiceConfig, run: Callable[[Ready], Coroutine[Any, Any, Any]]) -> None:
        """Starts ``run`` and returns when it serves. Raises what it raised before."""
        self._grace, self._tls = config.grace_period, config.client_tls()
        ready: asyncio.Future[Service] = asyncio.get_running_loop().create_future()
        self._serving = asyncio.create_task(run(ready.set_result))
        self._serving.add_done_callback(self._note_end)
        await asyncio.wait({ready, self._serving}, return_when=asyncio.FIRST_COMPLETED)
        if not ready.done():
            self._serving.result()
            raise RuntimeError("the service ended before it served; its log says why")
        self._service = ready.result()

    async def check_health(self) -> None:
        """Asks the service's own health service, through its port. Raises when the replica is to be replaced."""
        if self._serving.done():
            self._serving.result()
            if not self._service.draining or asyncio.get_running_loop().time() - self._ended_at >= self.stays:
                raise RuntimeError("the service has ended")
        elif not self._service.draining:
            await check_alive(self._service.address, self._tls)

    async def drain(self) -> None:
        """Drains the service and waits for its end. What still runs after the grace period goes on elsewhere."""
        self._service.drain()
        try:
            await asyncio.wait_for(asyncio.shield(self._serving), self._grace + DRAIN_MARGIN)
        except TimeoutError:
            logger.warning("leaving with the service unfinished, %.0f s after its drain began", self._grace)

    def _note_end(self, serving: asyncio.Task[Any]) -> None:
        self._ended_at = asyncio.get_running_loop().time()


class WorkerReplica(Replica):
    """A prefill or a decode worker, which finds its routers through the application's directory."""

    async def __init__(self, stage: str, spec: StackSpec) -> None:  # type: ignore[misc]
        context = serve.get_replica_context()
        place = WorkerPlace(
            id=f"{stage}-{context.replica_tag}", routers=f"ray:///{context.app_name}", node_ip=get_node_ip_address()
        )
        spec = await _prepared(spec, stage, place.id)
        config = spec.prefill_config(place) if stage == PREFILL else spec.decode_config(place)
        # Here: only what this replica runs is to be imported, and the variables that Ray sets are read by then.
        if spec.mock:
            from services.mock.running import serve as serve_mock

            await self.start(config, lambda ready: serve_mock(config, ready))  # type: ignore[arg-type]
            return
        from overfill.engine.device import cpu_settings

        self._cpu_settings = cpu_settings(config.threads)
        self._cpu_settings.__enter__()  # for the life of the process
        if stage == PREFILL:
            from services.prefill.main import serve as serve_prefill

            await self.start(config, lambda ready: serve_prefill(config, ready))  # type: ignore[arg-type]
        else:
            from services.decode.main import serve as serve_decode

            await self.start(config, lambda ready: serve_decode(config, ready))  # type: ignore[arg-type]

    async def __del__(self) -> None:
        """Serve awaits it before it ends a replica."""
        with suppress(AttributeError):  # it never served
            await self.drain()


class RouterReplica(Replica):
    """A router, which reports to the application's directory while it takes requests."""

    stays = DRAINED_STAYS

    async def __init__(self, spec: StackSpec, *pools: object) -> None:  # type: ignore[misc]
        """``pools`` make the workers' deployments part of the application; nothing is sent through them."""
        context = serve.get_replica_context()
        self._application = context.app_name
        spec = await _prepared(spec, ROUTER, f"router-{context.replica_tag}")

        async def run(ready: Ready) -> None:
            router = await _listening_router(spec)
            ready(router)
            await router.run()

        await self.start(spec.router_config(), run)
        host, port = split_address(self._service.address)
        self._address = f"{get_node_ip_address()}:{port}" if is_wildcard(host) else self._service.address
        self._reporting = asyncio.create_task(
            directory.keep_reported(self._application, self._address, lambda: not self._service.draining)
        )

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Serve collects these for the application's scaling policy (``overfill.cluster.policy``)."""
        router: Router = self._service  # type: ignore[assignment]
        return router.signals.read(asyncio.get_running_loop().time())

    async def __del__(self) -> None:
        """Serve awaits it before it ends a replica."""
        with suppress(AttributeError):  # it never served
            self._reporting.cancel()
            self._service.drain()
            await directory.withdraw(self._application, self._address)
            await self.drain()


async def _listening_router(spec: StackSpec) -> Router:
    """A router that has started, on the first of the ports that is free. Raises Unavailable when none becomes free.

    Logs one warning when none is free at first.
    """
    from services.router.app import Router

    loop = asyncio.get_running_loop()
    # A predecessor that drains has its port until its last request is finished.
    patience = spec.grace_period + DRAIN_MARGIN
    deadline = loop.time() + patience
    for attempt in itertools.count():
        router = Router(spec.router_config(attempt % len(spec.router.ports)))
        try:
            await router.start()
            break
        except Unavailable as error:
            if loop.time() > deadline:
                raise
            if attempt == len(spec.router.ports) - 1:
                logger.warning(
                    "%s; the router tries again for %.0f s; where the port is another program's, choose others with "
                    "--grpc and --http, or --http off", error, patience,
                )  # fmt: skip
            if attempt % len(spec.router.ports) == len(spec.router.ports) - 1:
                await asyncio.sleep(_PORT_POLL)
    return router


async def check_alive(address: str, tls: ClientTls | None) -> None:
    """Raises unless the process at ``address`` answers.

    Ignores readiness: a router without workers is not ready, and a new router would have none either.
    """
    channel = open_channel(address, tls)
    try:
        stub = health_pb2_grpc.HealthStub(channel)
        await checked_response(stub.Check(health_pb2.HealthCheckRequest()), address)
    finally:
        await channel.close(None)


async def _prepared(spec: StackSpec, deployment: str, name: str) -> StackSpec:
    """Sets the process up for the replica ``name``; the spec with its pair found, or made, on this machine."""
    for variable in [variable for variable in os.environ if variable.startswith(SETTINGS)]:
        del os.environ[variable]  # what a replica runs with is in its arguments
    settings = spec.settings | spec.pools[deployment].settings
    form: logs.LogFormat = "json" if settings.get("log_format") == "json" else "text"
    each = settings.get("log_requests") == "on"
    level = str(settings.get("log_level", "info"))
    logs.configure(level, form, _log_handler(spec.log_dir, name), each_request=each)
    _keep_serve_local()
    with startup.once():
        pair = await asyncio.to_thread(resolve_pair, spec.pair)
    return spec.model_copy(update={"pair": str(pair)})


def _keep_serve_local() -> None:
    """Has Serve's own server in this replica listen on loopback where Ray does: it takes every interface otherwise.

    There is no setting for it. The server starts after the service; nothing of ours goes through it.
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

"""The router, assembled from its parts. ``main`` runs it as a process; tests and Ray run it in their event loop."""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from overfill.errors import ShuttingDown, Unavailable
from overfill.process.heap import Heap
from overfill.process.open_files import allow_connections
from overfill.routing.admission import KeyLimiter
from overfill.routing.router_need import RouterNeed
from overfill.routing.scaling import INTERVAL
from overfill.routing.stream import GrpcConnector
from overfill.routing.worker import STAGE_NAMES
from overfill.rpc.access import AccessPolicy
from overfill.rpc.addresses import instead_of_wildcard, is_loopback, reachable, split_address
from overfill.rpc.constants import MAX_CONNECTIONS
from overfill.rpc.metrics_http import MetricsServer
from overfill.rpc.server import RpcServer, until_free
from overfill.rpc.tls import TlsError
from overfill.settings.config import RouterConfig
from overfill.telemetry import tracing
from overfill.telemetry.metric_set import Sampled
from overfill.telemetry.picker import PickerGauges
from overfill.telemetry.router_metrics import RouterMetrics
from overfill.v1 import (
    admin_pb2,
    admin_pb2_grpc,
    common_pb2,
    inference_pb2,
    inference_pb2_grpc,
    registry_pb2,
    registry_pb2_grpc,
)
from overfill.version import __version__
from services.router.adapter_changes import AdapterChanges
from services.router.admin import AdminServicer
from services.router.core import Core, load_cores
from services.router.inference import InferenceServicer
from services.router.kv_blocks import kv_blocks
from services.router.limits import RequestLimits
from services.router.open_requests import OpenRequests
from services.router.port_group import Member, PortGroup
from services.router.registry import RegistryServicer, SharedPortRegistry
from services.router.revisions import Revisions
from services.router.shared import Shared

if TYPE_CHECKING:
    from services.router.http.app import HttpApi
    from services.router.http.server import HttpServer

logger = logging.getLogger(__name__)

STOP_GRACE = 0.5
"""Seconds for the last messages to be sent after the last request has ended."""

_REOPENING = 1.0
"""Seconds in which a closed listener frees its port."""

_REOPENED_AGE = 0.5
"""Seconds after which a draining router closes a connection to its reopened port.

The client then connects again, and may reach another router.
"""


class Router:
    """Serves Inference, Registry and Admin on one port, and the HTTP endpoint on another if configured.

    With ``config.share_port``, other router processes serve the same two ports, and each serves Registry on a third
    port of its own. It serves Admin on both: there for itself, and on the shared port for all of the processes.

    Args:
        config: validated configuration.

    Attributes:
        cores: what serves each revision, the old one first.
        roster: the joined workers of the old revision.
        dispatcher: its running and waiting requests.

    Raises:
        InvalidPair: the pair folder is damaged, or the named pair is not prepared and cannot be prepared here.
        TlsError: a certificate cannot be read.
        BadKeyFile: the API keys or the secret cannot be read.
        Unavailable: the folder of ``config.share_port`` cannot be used.
    """

    def __init__(self, config: RouterConfig) -> None:
        config.check_files()
        self._config = config
        self._id = f"router-{secrets.token_hex(4)}"
        self._incarnation = secrets.randbits(64)
        self._address = self._join_address = self._http_address = ""
        self._group = None if config.share_port is None else PortGroup(config.share_port)
        self._stopping = asyncio.Event()
        specs = config.revisions
        self._metrics = RouterMetrics([tier.name for tier in specs[0].tiers], [spec.name for spec in specs])
        self._connector = GrpcConnector(config.credentials())
        self._requests = OpenRequests(KeyLimiter() if self._group is None else KeyLimiter(self._group.usage_of))
        limits = RequestLimits(
            config.max_attempts, config.max_request_bytes, config.max_request_time, config.stream_interval
        )
        self._shared = Shared(self._connector, self._metrics, self._requests, limits)
        self.cores = load_cores(config, self._shared)
        self.roster, self.dispatcher = self.cores[0].roster, self.cores[0].dispatcher
        self._revisions = Revisions(self.cores, config.canary_percent)
        self._metrics.watch(
            self._of_all_cores(Core.waiting),
            self._of_all_cores(Core.running),
            self._of_all_cores(Core.workers),
            self._of_all_cores(Core.brownouts),
            self._revisions.sampled_shares,
            lambda: self._shared.sessions.num_active(time.monotonic()),
        )
        self._metrics.registry.register(
            PickerGauges(
                lambda: sum(count for core in self.cores for _, count in core.waiting()),
                lambda: sum(count for core in self.cores for _, count in core.running()),
                lambda: kv_blocks([core.roster for core in self.cores], time.monotonic()),
            )
        )
        self._exporter: MetricsServer | None = None
        keys = config.key_ring()
        access = config.router_access(keys)
        self._metrics_access = config.metrics_access(keys)
        self._adapter_changes = AdapterChanges([core.roster for core in self.cores], self._connector)
        self._http_api: HttpApi | None = None
        self._http = None if config.http == "off" else self._http_server(access)
        self._access = access
        self._registry = RegistryServicer(
            self._id,
            self._revisions,
            self._connector,
            on_lost=lambda info: self._metrics.worker_lost(STAGE_NAMES[info.stage], info.tier),
        )
        self._admin = self._admin_servicer(self._others)
        self._servers = [self._public_server()]
        if self._group is not None:
            join_server = self._rpc_server()
            self._add(join_server, self._registry, self._admin_servicer(lambda: ()))
            self._servers.append(join_server)

    def _of_all_cores(self, read: Callable[[Core], Sampled]) -> Callable[[], Sampled]:
        return lambda: [sample for core in self.cores for sample in read(core)]

    async def start(self) -> str:
        """Listens, and returns the address of the gRPC server for clients.

        Raises:
            Unavailable: the address is in use.
            TlsError: the host is open to other machines and there is no TLS.
        """
        tracing.configure(self._config.program, self._id, __version__, self._config.trace_endpoint())
        allow_connections(self._config.max_connections + MAX_CONNECTIONS, ", or lower --max-connections")
        try:
            await self._listen()
        except BaseException:
            for server in self._servers:
                await server.stop()
            raise
        for server in self._servers:
            server.set_ready(True)
        logger.info("%s listens on %s", self._id, self._address)
        return self._address

    async def _listen(self) -> None:
        config = self._config
        if self._group is not None:
            self._join_address = await self._servers[1].start(f"{config.host}:{config.join_port}")
            logger.info("%s lets workers join at %s", self._id, self._join_address)
        self._address = await self._servers[0].start(f"{config.host}:{config.port}")
        if self._http is not None:
            assert config.http != "off"
            self._http_address = await self._http.start(config.host, config.http)
            logger.info("%s serves HTTP on %s", self._id, self._http_address)
        if config.metrics_port != "off":
            self._exporter = MetricsServer(
                self._metrics.registry,
                config.metrics_host,
                config.metrics_port,
                config.server_tls(),
                self._targets,
                self._metrics_access,
            )
            logger.info("%s serves metrics on %s", self._id, self._exporter.address)
        if self._group is not None:
            self._group.announce(self.member())

    @property
    def address(self) -> str:
        """Address of the gRPC server, ``host:port``; empty before ``start``."""
        return self._address

    @property
    def draining(self) -> bool:
        """True once the router has begun to send clients away."""
        return self._stopping.is_set()

    @property
    def http_address(self) -> str:
        """Address of the HTTP endpoint, ``host:port``; empty without one, and before ``start``."""
        return self._http_address

    def drain(self) -> None:
        """Sends clients away. ``run`` returns once all requests have ended, at latest after the grace period."""
        if not self._stopping.is_set():
            logger.info("%s drains", self._id)
            for server in self._servers:
                server.set_ready(False)
            self._stopping.set()

    async def run(self) -> None:
        """Serves until drained, then stops."""
        advising = asyncio.create_task(self._advise())
        try:
            await self._stopping.wait()
        finally:
            advising.cancel()
        # Clients connect to other routers at once, so that none is refused. Requests on connections that close are
        # still served.
        leaving = asyncio.create_task(self._leave_port() if self._group is None else self._leave_shared_port())
        try:
            async with asyncio.timeout(self._config.grace_period):
                await asyncio.shield(leaving)
        except TimeoutError:
            self._requests.drain()
            self._requests.abort_all(
                ShuttingDown("the router shut down before the answer was complete; send the request again")
            )
        await leaving
        if self._http is not None:
            await self._http.stop()
        await asyncio.gather(*[server.stop(STOP_GRACE) for server in self._servers])
        await self._connector.close()
        if self._group is not None:
            self._group.leave()
        if self._exporter is not None:
            self._exporter.close()
        for core in self.cores:
            core.close()
        await tracing.flush()

    async def _leave_shared_port(self) -> None:
        """Closes the listeners of the shared ports, and each connection once its answers have ended."""
        grace = self._config.grace_period + STOP_GRACE
        await asyncio.gather(self._servers[0].stop(grace), *([] if self._http is None else [self._http.stop()]))

    async def _leave_port(self) -> None:
        """Closes each client's connection once its answers have ended; returns when all answers have.

        A client that connects again reaches another router behind the same name. If it reaches this one, it is told
        that the router shuts down, and has to connect once more after ``_REOPENED_AGE``. Workers keep their
        connections, and further workers can join, because answers may have to move to them.
        """
        if self._http is not None:
            self._http.drain()
        (old,) = self._servers
        closing = asyncio.create_task(old.stop(self._config.grace_period + STOP_GRACE))
        new = self._public_server(_REOPENED_AGE)
        try:
            with suppress(TimeoutError):
                async with asyncio.timeout(_REOPENING):
                    await until_free(self._address)
            await new.start(self._address)
            self._servers.append(new)
        except (Unavailable, TlsError) as error:
            logger.warning("new workers cannot join while this router drains: %s", error)
        self._requests.drain()
        await self._requests.wait_idle()
        await old.stop(STOP_GRACE)
        await closing

    def _public_server(self, max_connection_age: float | None = None) -> RpcServer:
        """Returns a server for clients, and without ``share_port`` also for workers, that has not started."""
        server = self._rpc_server(share_port=self._group is not None, max_connection_age=max_connection_age)
        server.add(
            inference_pb2_grpc.add_InferenceServicer_to_server,
            InferenceServicer(self._revisions),
            inference_pb2.DESCRIPTOR.services_by_name["Inference"].full_name,
        )
        self._add(server, self._registry if self._group is None else SharedPortRegistry(), self._admin)
        return server

    def _rpc_server(self, *, share_port: bool = False, max_connection_age: float | None = None) -> RpcServer:
        return RpcServer(
            self._config.server_tls(),
            self._config.max_connections,
            access=self._access,
            condition=lambda: not self.unready(),
            share_port=share_port,
            max_connection_age=max_connection_age,
        )

    def _add(self, server: RpcServer, registry: registry_pb2_grpc.RegistryServicer, admin: AdminServicer) -> None:
        server.add(
            registry_pb2_grpc.add_RegistryServicer_to_server,
            registry,
            registry_pb2.DESCRIPTOR.services_by_name["Registry"].full_name,
        )
        server.add(
            admin_pb2_grpc.add_AdminServicer_to_server,
            admin,
            admin_pb2.DESCRIPTOR.services_by_name["Admin"].full_name,
        )

    def _admin_servicer(self, others: Callable[[], Sequence[Member]]) -> AdminServicer:
        credentials = self._config.credentials()
        return AdminServicer(self, self._revisions, self._connector, others, credentials, self._adapter_changes)

    def _http_server(self, access: AccessPolicy) -> HttpServer:
        # Import here, so that a router without the endpoint does not load its libraries.
        from services.router.http.app import HttpApi
        from services.router.http.server import HttpServer

        self._http_api = HttpApi(
            self._revisions,
            access,
            self.unready,
            lambda: self._admin.known(),
            self._adapter_changes,
            share_port=self._group is not None,
            local=is_loopback(self._config.host),
            allowed_origins=self._config.allowed_origins,
        )
        return HttpServer(
            self._http_api,
            self._config.max_connections,
            self._config.server_tls(),
            max_body=self._config.max_request_bytes,
            max_bodies=self._config.max_body_bytes,
            client_certificates=access.keys is None,  # API keys suffice, and few HTTP clients have certificates
            share_port=self._group is not None,
            stop_grace=STOP_GRACE if self._group is None else self._config.grace_period + STOP_GRACE,
        )

    async def _advise(self) -> None:
        loop, heap, need = asyncio.get_running_loop(), Heap(), RouterNeed()
        while True:
            self._metrics.router_need(need.update(loop.time(), time.thread_time()))
            for core in self.cores:
                core.advise(loop.time())
            if heap.has_grown():
                await asyncio.to_thread(heap.trim)
            await asyncio.sleep(INTERVAL)

    def _others(self) -> list[Member]:
        return [] if self._group is None else self._group.others()

    def member(self) -> Member:
        """Returns this process's addresses."""
        host, port = split_address(self._join_address or self._address)
        metrics = "" if self._exporter is None else self._exporter.address
        return Member(self._id, f"{reachable(host)}:{port}", metrics)

    def _targets(self, host: str) -> list[dict[str, Any]]:
        """Returns all processes' metrics addresses; ``host`` is where the scraper reaches this machine."""
        addresses = {router.id: router.metrics_address for router in (self.member(), *self._others())}
        routers = [
            {"targets": [instead_of_wildcard(address, host)], "labels": {"stage": "router", "worker": router}}
            for router, address in addresses.items()
            if address
        ]
        return [*routers, *self._registry.targets()]

    def unready(self) -> str:
        """Returns why the router cannot answer requests now; empty if it can."""
        if self.draining:
            return "the router is draining"
        now = asyncio.get_running_loop().time()
        reasons = [core.unready(now) for core in self.cores]
        return "; ".join(reasons) if all(reasons) else ""

    def activity(self, histograms: bool) -> admin_pb2.Activity:
        """Returns the rolling statistics; with True, their histograms too."""
        waiting = sum(core.dispatcher.num_waiting for core in self.cores)
        jobs = sum(core.dispatcher.num_jobs for core in self.cores)
        stats, sessions, now = self._shared.rolling, self._shared.sessions, asyncio.get_running_loop().time()
        activity = stats.activity(jobs - waiting, waiting, now)
        activity.sessions = sessions.num_active(now)
        activity.busiest_sessions.extend(sessions.busiest(now))
        if histograms:
            activity.histograms.extend(stats.histograms(now))
        return activity

    def status(self) -> admin_pb2.ProcessStatus:
        """Returns what this process says of itself."""
        return admin_pb2.ProcessStatus(
            id=self._id,
            stage=common_pb2.STAGE_ROUTER,
            pid=os.getpid(),
            address=self._address,
            ready=not self.unready(),
            draining=self.draining,
            software_version=__version__,
            incarnation=self._incarnation,
            metrics_address="" if self._exporter is None else self._exporter.address,
        )

"""The shell around a worker's own service: Admin, membership, readiness, signals and draining. No torch.

A worker process builds its servicer, hands it to ``WorkerHost`` and awaits ``run``.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import signal
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from overfill.errors import Incompatible, InvalidRequest, OverfillError, ShuttingDown
from overfill.process import startup
from overfill.rpc.addresses import split_address
from overfill.rpc.interceptors import Context
from overfill.rpc.membership import Membership, PrefixKeys
from overfill.rpc.server import RpcServer
from overfill.rpc.tls import Credentials
from overfill.v1 import admin_pb2, admin_pb2_grpc, common_pb2, decode_pb2, registry_pb2

log = logging.getLogger(__name__)

ADMIN_SERVICE = "overfill.v1.Admin"
_POLL = 0.05  # seconds between looks at what still runs while draining


@dataclass(frozen=True, slots=True)
class WorkerHandle:
    """What the host asks of the worker inside it.

    Attributes:
        load: a snapshot of the engine.
        active: requests being served.
        end_all: ends every request with an error after which it goes on elsewhere.
        capacity: most requests at once; divided among the routers as credits.
        healthy: False once the engine can serve nothing any more.
        codec: encoding in which a decode worker asks for KV.
        prefix_keys: the changes of a prefill worker's prefix cache, for one router each.
    """

    load: Callable[[], decode_pb2.WorkerLoad]
    active: Callable[[], int]
    end_all: Callable[[OverfillError], None]
    capacity: int
    healthy: Callable[[], bool]
    codec: common_pb2.KvCodec = common_pb2.KV_CODEC_UNSPECIFIED
    prefix_keys: PrefixKeys | None = None


class WorkerHost:
    """Runs a worker until it is told to stop.

    SIGTERM, SIGINT (in a process of its own) and ``Admin.Drain`` drain it: readiness off at once, nothing new is taken,
    running requests have ``grace`` seconds to finish; those that do not are told, and go on elsewhere.

    Args:
        server: with the worker's own service added, not started.
        hello: complete but for ``address``, ``data_address`` and ``startup_seconds``.
        advertise: host, or host:port, that others reach this one at; empty is what it listens on.
    """

    def __init__(
        self,
        server: RpcServer,
        hello: registry_pb2.Hello,
        worker: WorkerHandle,
        routers: Sequence[str],
        tls: Credentials | None,
        grace: float,
        advertise: str = "",
    ) -> None:
        self._server = server
        self._hello = hello
        self._worker = worker
        self._routers = routers
        self._tls = tls
        self._grace = grace
        self._advertise = advertise
        self._stop = asyncio.Event()
        self._refusal: Incompatible | None = None
        self._membership: Membership | None = None
        server.add(admin_pb2_grpc.add_AdminServicer_to_server, _Admin(self), ADMIN_SERVICE)

    @property
    def draining(self) -> bool:
        """Nothing new is to be taken."""
        return self._stop.is_set()

    def drain(self) -> None:
        """Starts draining; idempotent."""
        if not self._stop.is_set():
            log.info("draining: %d requests running", self._worker.active())
            self._stop.set()
            self._server.set_ready(False)
            self.notify()

    def notify(self, *, debounce: bool = False) -> None:
        """Load has changed; tells the routers soon, or when it suits if that can wait (``debounce``)."""
        if self._membership is not None:
            self._membership.notify(debounce=debounce)

    @property
    def address(self) -> str:
        """Where others reach this worker, ``host:port``; empty before it listens."""
        return self._hello.address

    async def run(self, address: str, on_ready: Callable[[WorkerHost], object] = lambda host: None) -> int:
        """Serves on ``address`` until drained; returns the process's exit code. ``on_ready`` is called once it serves.

        Raises:
            Unavailable: the address cannot be bound.
            Incompatible: every router refused the worker for good.
        """
        loop = asyncio.get_running_loop()
        # Within another process, such as a Ray replica's, signals are that process's affair.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.add_signal_handler(number, self.drain)
        bound = await self._server.start(address)
        self._hello.address = self._hello.data_address = announced(bound, self._advertise)
        self._hello.startup_seconds = startup.seconds()
        self._membership = Membership(
            self._hello,
            self._routers,
            self._report,
            tls=self._tls,
            on_refused=self._on_refused,
            prefix_keys=self._worker.prefix_keys,
        )
        await self._membership.start()
        self._server.set_ready(True)
        log.info("%s ready on %s, announced as %s", self._hello.worker_id, bound, self._hello.address)
        on_ready(self)
        try:
            await self._until_stopped()
            await self._until_idle()
        finally:
            await self._membership.stop()
            await self._server.stop(grace=0.5)
        if self._refusal is not None:
            raise self._refusal
        return 0 if self._worker.healthy() else 1

    async def _until_stopped(self) -> None:
        while not self._stop.is_set():
            if not self._worker.healthy():
                log.critical("the engine has died; leaving")
                self.drain()
            try:
                await asyncio.wait_for(self._stop.wait(), timeout=1.0)
            except TimeoutError:
                continue

    async def _until_idle(self) -> None:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._grace
        # A poll, since the counts belong to the servicer and its engine, which know nothing of hosts.
        while self._worker.active() and self._worker.healthy() and loop.time() < deadline:  # noqa: ASYNC110
            await asyncio.sleep(_POLL)
        if self._worker.active():
            log.warning("leaving with %d requests unfinished", self._worker.active())
            self._worker.end_all(ShuttingDown(f"{self._hello.worker_id} leaves before the request is finished"))

    def _report(self) -> registry_pb2.Report:
        return registry_pb2.Report(
            load=self._worker.load(),
            credits=self._worker.capacity,
            ready=True,
            draining=self.draining,
        )

    def _on_refused(self, error: Incompatible) -> None:
        self._refusal = error
        self.drain()

    def status(self) -> admin_pb2.ProcessStatus:
        hello = self._hello
        return admin_pb2.ProcessStatus(
            id=hello.worker_id,
            stage=hello.stage,
            pid=os.getpid(),
            address=hello.address,
            ready=not self.draining,
            draining=self.draining,
            load=self._worker.load(),
            software_version=hello.software_version,
            incarnation=hello.incarnation,
            model=hello.model,
            kv=hello.kv,
            codec=self._worker.codec,
            metrics_address=hello.metrics_address,
        )


def announced(bound: str, advertise: str) -> str:
    """The address that others are told: ``bound``, a ``host:port``, with the host or host:port of ``advertise``."""
    if not advertise:
        return bound
    if re.fullmatch(r"(\[.*\]|[^:]+):\d+", advertise):
        return advertise
    host = f"[{advertise}]" if ":" in advertise and not advertise.startswith("[") else advertise
    return f"{host}:{split_address(bound)[1]}"


class _Admin(admin_pb2_grpc.AdminServicer):
    def __init__(self, host: WorkerHost) -> None:
        self._host = host

    async def Status(self, request: admin_pb2.StatusRequest, context: Context) -> admin_pb2.StatusResponse:
        return admin_pb2.StatusResponse(process=self._host.status())

    async def Drain(self, request: admin_pb2.DrainRequest, context: Context) -> admin_pb2.DrainResponse:
        if request.worker_id not in ("", self._host.status().id):
            raise InvalidRequest("worker_id", f"this is {self._host.status().id}, not {request.worker_id}")
        self._host.drain()
        return admin_pb2.DrainResponse()

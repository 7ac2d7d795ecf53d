"""Runs a worker around its own service: Admin service, membership, readiness, signals and draining. No torch.

A worker process adds its servicer to an ``RpcServer``, passes that to ``WorkerHost`` and awaits ``run``.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from overfill.errors import Incompatible, InvalidRequest, OverfillError, ShuttingDown, Unavailable
from overfill.process import startup
from overfill.process.open_files import allow_connections
from overfill.request.answer_start import MAX_TAIL_TOKENS
from overfill.rpc.addresses import announced, instead_of_wildcard, split_address
from overfill.rpc.constants import MAX_CONNECTIONS, MAX_STARTUP
from overfill.rpc.interceptors import Context
from overfill.rpc.membership import Membership, PrefixKeys
from overfill.rpc.server import RpcServer
from overfill.rpc.tls import Credentials
from overfill.v1 import admin_pb2, admin_pb2_grpc, common_pb2, decode_pb2, prefill_pb2, registry_pb2

log = logging.getLogger(__name__)

ADMIN_SERVICE = "overfill.v1.Admin"
_POLL = 0.05  # seconds between checks for running requests while draining

_Description = TypeVar("_Description", decode_pb2.DescribeDecodeResponse, prefill_pb2.DescribePrefillResponse)


class AdapterLoader(Protocol):
    """Loads and unloads the adapters of a decode worker, as Admin asks."""

    async def start(self) -> None:
        """Loads those with which the worker starts."""
        ...

    async def load(self, name: str) -> common_pb2.Adapter:
        """Loads an adapter from the worker's folder and returns it. Raises OverfillError."""
        ...

    async def unload(self, name: str) -> common_pb2.Adapter:
        """Refuses new requests for an adapter and returns it. Raises OverfillError."""
        ...


@dataclass(frozen=True, slots=True)
class WorkerHandle:
    """Interface through which ``WorkerHost`` uses a worker.

    Attributes:
        load: returns a snapshot of the engine's load.
        active: returns the number of running requests.
        end_all: ends every request with the given error, so that its router moves it to another worker.
        capacity: maximum concurrent requests; routers get shares of it as credits.
        healthy: returns False once the engine can no longer serve requests.
        codec: codec in which a decode worker requests KV.
        prefix_keys: keys of a prefill worker's prefix cache; None means that there is none.
        disk_keys: keys of its KV on disk; None means that there is none.
        costs: what KV costs a worker that prefills; None means one that does not.
        prefill_load: with both stages, returns the load of the prefill stage; ``load`` is then the decode stage's.
        on_drain: called once, when a drain starts.
        adapters: changes the worker's adapters; None means that it has none.
    """

    load: Callable[[], decode_pb2.WorkerLoad]
    active: Callable[[], int]
    end_all: Callable[[OverfillError], None]
    capacity: int
    healthy: Callable[[], bool]
    codec: common_pb2.KvCodec = common_pb2.KV_CODEC_UNSPECIFIED
    prefix_keys: PrefixKeys | None = None
    disk_keys: PrefixKeys | None = None
    costs: Callable[[], registry_pb2.KvCosts] | None = None
    prefill_load: Callable[[], decode_pb2.WorkerLoad] | None = None
    on_drain: Callable[[], None] = lambda: None
    adapters: AdapterLoader | None = None


class WorkerHost:
    """Runs a worker until it has drained. It reports ready from its first join of a router until the drain.

    ``Admin.Drain``, and in a process of its own SIGTERM and SIGINT, start a drain. The worker then reports not ready
    and refuses new requests. Running requests have ``grace`` seconds to finish; after that the worker ends them with an
    error, and their routers move them to other workers.

    Args:
        server: server with the worker's own service added, not started.
        hello: description of the worker, without addresses, ``startup_seconds`` and ``max_num_seqs``. A worker with
            ranks has their data addresses in it.
        worker: the worker itself.
        routers: routers to join, as for ``Membership``.
        tls: credentials to send to routers; None sends none, without TLS.
        grace: seconds for running requests to finish after a drain has started.
        advertise: host or ``host:port`` at which others reach this worker; empty means the address it listens on. The
            ranks of a worker have the host and their own ports.
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
        self._joined = False
        server.add(admin_pb2_grpc.add_AdminServicer_to_server, _Admin(self), ADMIN_SERVICE)

    @property
    def draining(self) -> bool:
        """True once a drain has started: the worker must refuse new requests."""
        return self._stop.is_set()

    def drain(self) -> None:
        """Starts draining; idempotent."""
        if not self._stop.is_set():
            log.info("draining: %d requests running", self._worker.active())
            self._stop.set()
            self._server.set_ready(False)
            self._worker.on_drain()
            self.notify()

    def unready(self) -> str:
        """Returns why the worker takes no requests now; empty if it does."""
        if self.draining:
            return "the worker is draining"
        return "" if self._joined else "the worker has joined no router"

    def notify(self, *, debounce: bool = False) -> None:
        """Reports a changed load to the routers soon; with ``debounce``, a little later, because it can wait."""
        if self._membership is not None:
            self._membership.notify(debounce=debounce)

    @property
    def address(self) -> str:
        """Address at which others reach this worker, ``host:port``; empty before it listens."""
        return self._hello.address

    async def run(self, address: str, on_ready: Callable[[WorkerHost], object] = lambda host: None) -> int:
        """Serves on ``address`` until drained and returns the process's exit code. Calls ``on_ready`` once it serves.

        Raises:
            Unavailable: the address cannot be bound.
            Incompatible: every router refused the worker.
        """
        if self._worker.adapters is not None:
            await self._worker.adapters.start()
        loop = asyncio.get_running_loop()
        # Inside another process, such as a Ray replica, that process handles signals.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.add_signal_handler(number, self.drain)
        allow_connections(MAX_CONNECTIONS)
        bound = await self._server.start(address)
        announce(self._hello, announced(bound, self._advertise))
        self._hello.startup_seconds = min(startup.seconds(), MAX_STARTUP)
        self._hello.max_num_seqs = self._worker.capacity
        self._membership = Membership(
            self._hello,
            self._routers,
            self._report,
            tls=self._tls,
            on_refused=self._on_refused,
            prefix_keys=self._worker.prefix_keys,
            disk_keys=self._worker.disk_keys,
        )
        await self._membership.start()
        log.info("%s serves on %s, announced as %s", self._hello.worker_id, bound, self._hello.address)
        if not self._routers:
            log.warning("%s joins no router and gets no requests: name routers with --routers", self._hello.worker_id)
        joining = asyncio.create_task(self._become_ready(self._membership))
        on_ready(self)
        try:
            await self._until_stopped()
            await self._until_idle()
            await self._membership.drain_reported()
        finally:
            joining.cancel()
            await self._membership.stop()
            await self._server.stop(grace=0.5)
        if self._refusal is not None:
            raise self._refusal
        return 0 if self._worker.healthy() else 1

    async def _become_ready(self, membership: Membership) -> None:
        # A rollout must not replace workers by ones that reach no router. Once joined, a worker stays ready while
        # routers restart. Otherwise all workers would become unready at once, and budgets would block node drains.
        if self._routers:
            await membership.joined.wait()
        self._joined = True
        if not self.draining:
            self._server.set_ready(True)

    async def _until_stopped(self) -> None:
        while not self._stop.is_set():
            if not self._worker.healthy():
                log.critical("the engine has failed; draining and exiting")
                self.drain()
            try:
                await asyncio.wait_for(self._stop.wait(), timeout=1.0)
            except TimeoutError:
                continue

    async def _until_idle(self) -> None:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._grace
        # Poll, because the servicer and its engine own the counts and do not know the host.
        while self._worker.active() and self._worker.healthy() and loop.time() < deadline:  # noqa: ASYNC110
            await asyncio.sleep(_POLL)
        if self._worker.active():
            log.warning("exiting with %d requests unfinished", self._worker.active())
            self._worker.end_all(ShuttingDown(f"{self._hello.worker_id} shuts down before the request has finished"))

    def _report(self) -> registry_pb2.Report:
        return registry_pb2.Report(
            load=self._worker.load(),
            prefill_load=self._prefill_load(),
            credits=self._worker.capacity,
            ready=True,
            draining=self.draining,
            adapters=registry_pb2.AdapterList(adapters=self._hello.adapters),
            costs=None if self._worker.costs is None else self._worker.costs(),
        )

    def _prefill_load(self) -> decode_pb2.WorkerLoad | None:
        return None if self._worker.prefill_load is None else self._worker.prefill_load()

    def _on_refused(self, error: Incompatible) -> None:
        self._refusal = error
        self.drain()

    def adapters(self, *, load: bool) -> AdapterLoader:
        """Returns what changes the worker's adapters, to load one or to unload one.

        Raises:
            Incompatible: it takes no adapters.
            ShuttingDown: it drains, so that it loads none.
        """
        if self._worker.adapters is None:
            reason = "takes no adapters: start the decode workers with --adapters FOLDER and without --max-adapters 0"
            raise Incompatible(f"{self._hello.worker_id} {reason}", ["adapters"])
        if load and self.draining:
            raise ShuttingDown(f"{self._hello.worker_id} is draining")
        return self._worker.adapters

    def status(self) -> admin_pb2.ProcessStatus:
        hello = self._hello
        return admin_pb2.ProcessStatus(
            id=hello.worker_id,
            stage=hello.stages[-1],  # with both stages, decode
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
            engine=hello.engine,
            tier=hello.tier,
            prefill_load=self._prefill_load(),
            startup_seconds=hello.startup_seconds,
        )


def check_start(
    start: decode_pb2.StartDecode | prefill_pb2.StartPrefill, hello: registry_pb2.Hello, *, draining: bool
) -> None:
    """Checks that the worker accepts new requests, and that it is the one that the router means.

    Raises:
        ShuttingDown: the worker drains.
        Unavailable: the router means an earlier incarnation.
        InvalidRequest: ``answer_start`` leaves the full model no token of the prompt, is behind it, or leaves the
            decoder too many tokens.
    """
    if draining:
        raise ShuttingDown(f"{hello.worker_id} is draining")
    if start.expected_incarnation != hello.incarnation:
        raise Unavailable(f"{hello.worker_id} was restarted since the router chose it")
    prompt = len(start.prompt_token_ids)
    if start.HasField("answer_start") and not 1 <= start.answer_start <= prompt:
        raise InvalidRequest("answer_start", f"must be in 1..{prompt}, the prompt's length; got {start.answer_start}")
    tail = prompt - shared_tokens(start)
    if tail > MAX_TAIL_TOKENS and not start.sampling.HasField("prompt_logprobs"):
        reason = f"leaves the decoder {tail} of the prompt's {prompt} tokens; at most {MAX_TAIL_TOKENS} are allowed"
        raise InvalidRequest("answer_start", reason)


def shared_tokens(start: decode_pb2.StartDecode | prefill_pb2.StartPrefill) -> int:
    """Number of leading prompt tokens that the full model computes, and whose KV is handed over."""
    return start.answer_start if start.HasField("answer_start") else len(start.prompt_token_ids)


def fill_description(description: _Description, hello: registry_pb2.Hello) -> _Description:
    """Fills the fields of ``description`` that both stages have from ``hello``, and returns it."""
    description.wire_version = hello.wire_version
    description.software_version = hello.software_version
    description.engine = hello.engine
    description.worker_id = hello.worker_id
    description.incarnation = hello.incarnation
    description.model.CopyFrom(hello.model)
    description.kv.CopyFrom(hello.kv)
    description.max_model_len = hello.max_model_len
    return description


def announce(hello: registry_pb2.Hello, address: str) -> None:
    """Enters ``address``, ``host:port``, into ``hello``. On a prefill worker without ranks it serves all KV heads too.

    Ranks, and metrics that are served on every interface, are announced at the same host.
    """
    hello.address = address
    host = split_address(address)[0]
    if hello.metrics_address:
        hello.metrics_address = instead_of_wildcard(hello.metrics_address, host)
    for share in hello.data_addresses:
        share.address = f"{host}:{split_address(share.address)[1]}"
    if common_pb2.STAGE_PREFILL in hello.stages and not hello.data_addresses:
        hello.data_addresses.add(address=address, num_kv_heads=hello.kv.num_kv_heads)


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

    async def LoadAdapter(
        self, request: admin_pb2.LoadAdapterRequest, context: Context
    ) -> admin_pb2.ChangeAdapterResponse:
        return self._changed(await self._host.adapters(load=True).load(request.name))

    async def UnloadAdapter(
        self, request: admin_pb2.UnloadAdapterRequest, context: Context
    ) -> admin_pb2.ChangeAdapterResponse:
        return self._changed(await self._host.adapters(load=False).unload(request.name))

    def _changed(self, adapter: common_pb2.Adapter) -> admin_pb2.ChangeAdapterResponse:
        change = admin_pb2.AdapterChange(worker_id=self._host.status().id, adapter=adapter)
        return admin_pb2.ChangeAdapterResponse(workers=[change])

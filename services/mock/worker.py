"""The shell of a mock worker: its server, its membership and its Admin service. Other modules serve the stages."""

from __future__ import annotations

import asyncio
import os
import secrets
from collections.abc import Callable
from typing import Any, Protocol

from overfill.errors import Incompatible
from overfill.kv.handshake import KvIdentity
from overfill.kv.spec import DEFAULT_BLOCK_SIZE
from overfill.model.manifest import Pair
from overfill.pair.store import resolve_pair
from overfill.process import startup
from overfill.rpc.constants import WIRE_VERSION
from overfill.rpc.interceptors import Context
from overfill.rpc.membership import Membership
from overfill.rpc.server import RpcServer
from overfill.rpc.worker import announce, announced
from overfill.settings.config import DecodeConfig, WorkerConfig
from overfill.v1 import admin_pb2, admin_pb2_grpc, common_pb2, decode_pb2, registry_pb2
from overfill.version import __version__


class Stage(Protocol):
    """The servicer of a mock worker's stage."""

    worker: MockWorker

    @property
    def active(self) -> int:
        """Number of requests being served."""

    def load(self) -> decode_pb2.WorkerLoad: ...


class MockWorker:
    """Runs ``stage`` on the network.

    Attributes:
        pair, kv: pair and KV geometry that the worker pretends to have.
        hello: the worker's description of itself.
        draining: True once the worker accepts no new requests.
        drained: set once the worker drains and its last request has ended.
    """

    def __init__(self, config: WorkerConfig, stage: common_pb2.Stage) -> None:
        self.config = config
        self.pair = Pair.load(resolve_pair(config.pair))
        self.block_size = config.block_size or DEFAULT_BLOCK_SIZE
        geometry = self.pair.full_config
        self.kv = geometry.kv_spec(config.dtype or "float32")
        self.max_model_len = min(config.max_model_len or geometry.max_positions, geometry.max_positions)
        name = "prefill" if stage == common_pb2.STAGE_PREFILL else "decode"
        model = common_pb2.ModelIdentity(
            name=self.pair.name, full_digest=self.pair.full_digest, tokenizer_digest=self.pair.tokenizer_digest
        )
        tier = ""
        if isinstance(config, DecodeConfig):
            tier, quantize = config.tier, config.quantize or self.pair.quantize
            model.decoder_digest = self.pair.decoder_digest
            model.decoder_quantize = "" if quantize == "none" else quantize
            model.kv_cache_dtype = "" if config.kv_cache_dtype == "auto" else config.kv_cache_dtype
        self.hello = registry_pb2.Hello(
            worker_id=config.worker_id or f"mock-{name}-{secrets.token_hex(2)}",
            incarnation=secrets.randbits(63),
            stages=[stage],
            wire_version=WIRE_VERSION,
            software_version=__version__,
            model=model,
            kv=self.kv.to_proto(),
            max_model_len=self.max_model_len,
            vocab_size=geometry.vocab_size,
            pid=os.getpid(),
            engine="mock",
            tier=tier,
        )
        self.draining = False
        self.drained = asyncio.Event()
        self._server = RpcServer(config.server_tls(), config.max_rpcs, access=config.access())
        self._membership: Membership | None = None
        self._stage: Stage | None = None

    @property
    def identity(self) -> KvIdentity:
        return KvIdentity(WIRE_VERSION, self.pair.full_digest, self.pair.tokenizer_digest, self.kv)

    @property
    def address(self) -> str:
        """Address of this worker for others, ``host:port``; empty before it listens."""
        return self.hello.address

    async def start(self, stage: Stage, add_servicer: Callable[[Any, Any], None], service: str) -> str:
        """Serves ``stage``, joins the routers, and returns the bound address."""
        stage.worker = self
        self._stage = stage
        self._server.add(add_servicer, stage, service)
        self._server.add(admin_pb2_grpc.add_AdminServicer_to_server, _Admin(self), "overfill.v1.Admin")
        bound = await self._server.start(f"{self.config.host}:{self.config.port}")
        announce(self.hello, announced(bound, self.config.advertise))
        self.hello.startup_seconds = startup.seconds()
        self._membership = Membership(
            self.hello, self.config.routers, self._report, tls=self.config.credentials(), on_refused=self._on_refused
        )
        await self._membership.start()
        self._server.set_ready(True)
        return bound

    def notify(self) -> None:
        """Reports to the routers soon: the load has changed."""
        if self._membership is not None:
            self._membership.notify()

    def drain(self) -> None:
        """Refuses new requests from now on. ``drained`` is set once no request runs."""
        if not self.draining:
            self.draining = True
            self._server.set_ready(False)
            self.notify()
        self.check_drained()

    def check_drained(self) -> None:
        """Sets ``drained`` if the worker drains and no request runs. The stage calls it after each request."""
        if self.draining and self._stage is not None and self._stage.active == 0:
            self.drained.set()

    async def stop(self) -> None:
        """Leaves the routers and stops at once. Running requests are cut off."""
        if self._membership is not None:
            await self._membership.stop()
        await self._server.stop()

    def status(self) -> admin_pb2.ProcessStatus:
        assert self._stage is not None
        return admin_pb2.ProcessStatus(
            id=self.hello.worker_id,
            stage=self.hello.stages[0],
            pid=os.getpid(),
            address=self.hello.address,
            ready=not self.draining,
            draining=self.draining,
            load=self._stage.load(),
            software_version=__version__,
            incarnation=self.hello.incarnation,
            model=self.hello.model,
            kv=self.hello.kv,
            engine=self.hello.engine,
            tier=self.hello.tier,
        )

    def _report(self) -> registry_pb2.Report:
        assert self._stage is not None
        return registry_pb2.Report(
            load=self._stage.load(),
            credits=self.config.max_num_seqs,
            ready=True,
            draining=self.draining,
        )

    def _on_refused(self, error: Incompatible) -> None:
        self.draining = True
        self.drained.set()


class _Admin(admin_pb2_grpc.AdminServicer):
    def __init__(self, worker: MockWorker) -> None:
        self._worker = worker

    async def Status(self, request: admin_pb2.StatusRequest, context: Context) -> admin_pb2.StatusResponse:
        return admin_pb2.StatusResponse(process=self._worker.status())

    async def Drain(self, request: admin_pb2.DrainRequest, context: Context) -> admin_pb2.DrainResponse:
        self._worker.drain()
        return admin_pb2.DrainResponse()

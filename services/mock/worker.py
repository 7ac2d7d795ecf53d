"""The shell of a mock worker: its identity, its host and its metrics. Other modules serve the stages."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from overfill.errors import OverfillError, ShuttingDown, Unavailable
from overfill.kv.handshake import KvIdentity
from overfill.kv.spec import DEFAULT_BLOCK_SIZE
from overfill.model.manifest import Pair
from overfill.pair.store import resolve_pair
from overfill.rpc.constants import WIRE_VERSION
from overfill.rpc.metrics_http import MetricsServer
from overfill.rpc.server import RpcServer
from overfill.rpc.worker import WorkerHandle, WorkerHost
from overfill.settings.config import DecodeConfig, WorkerConfig
from overfill.telemetry.metrics import EngineMetrics
from overfill.v1 import common_pb2, decode_pb2, registry_pb2
from overfill.version import __version__


@dataclass(frozen=True, slots=True)
class MockLoad:
    """Load of a mock stage, with the fields of ``engine.sequence.EngineLoad``."""

    blocks_used: int
    blocks_total: int
    running: int
    waiting: int = 0
    queued_tokens: int = 0
    blocks_cached: int = 0
    prefix_tokens_looked_up: int = 0
    prefix_tokens_found: int = 0
    blocks_reserved: int = 0
    blocks_leaked: int = 0

    def to_proto(self, block_size: int) -> decode_pb2.WorkerLoad:
        return decode_pb2.WorkerLoad(
            kv_blocks_used=self.blocks_used,
            kv_blocks_total=self.blocks_total,
            running=self.running,
            waiting=self.waiting,
            block_size=block_size,
            queued_tokens=self.queued_tokens,
        )


class Stage(Protocol):
    """The servicer of a stage."""

    @property
    def stage(self) -> common_pb2.Stage: ...

    @property
    def metrics(self) -> EngineMetrics: ...

    def add_to(self, server: RpcServer) -> None:
        """Adds the stage's service to ``server``."""

    @property
    def active(self) -> int:
        """Number of requests being served."""

    def load(self) -> MockLoad: ...

    def end_all(self, error: OverfillError) -> None:
        """Ends every request with ``error``."""

    async def close(self) -> None:
        """Frees what the stage has opened."""


class MockWorker:
    """Runs stages on the network, in the host of a real worker.

    Attributes:
        pair, kv: pair and KV geometry that the worker pretends to have.
        hello: the worker's description of itself.
        host: None before ``serve``.
    """

    host: WorkerHost | None = None

    def __init__(self, config: WorkerConfig) -> None:
        self.config = config
        self.pair = Pair.load(resolve_pair(config.pair))
        self.block_size = config.block_size or DEFAULT_BLOCK_SIZE
        geometry = self.pair.full_config
        self.kv = geometry.kv_spec(config.dtype or "float32")
        model, tier = self.pair.model_identity("full"), ""
        if isinstance(config, DecodeConfig):
            tier, pair = config.tier, self.pair.with_quantize(config.quantize or self.pair.quantize)
            model = pair.model_identity("decoder", config.kv_cache_dtype)
        self.hello = registry_pb2.Hello(
            worker_id=config.worker_id or f"mock-{config.section}-{secrets.token_hex(2)}",
            incarnation=secrets.randbits(63),
            wire_version=WIRE_VERSION,
            software_version=__version__,
            model=model,
            kv=self.kv.to_proto(),
            max_model_len=min(config.max_model_len or geometry.max_positions, geometry.max_positions),
            vocab_size=geometry.vocab_size,
            pid=os.getpid(),
            engine="mock",
            tier=tier,
        )

    @property
    def identity(self) -> KvIdentity:
        return self.pair.kv_identity(self.kv.dtype)

    def notify(self) -> None:
        """Reports to the routers soon: the load has changed."""
        assert self.host is not None
        self.host.notify()

    def check_accepts(self, expected_incarnation: int) -> None:
        """Raises ShuttingDown while the worker drains, and Unavailable for a request to an earlier incarnation."""
        assert self.host is not None
        if self.host.draining:
            raise ShuttingDown(f"{self.hello.worker_id} is draining")
        if expected_incarnation != self.hello.incarnation:
            raise Unavailable(f"{self.hello.worker_id} was restarted since the router chose it")

    async def serve(self, stages: Sequence[Stage], on_ready: Callable[[WorkerHost], object]) -> int:
        """Serves ``stages`` until drained and returns the exit code. A cancel cuts the running requests off.

        Args:
            stages: prefill before decode.
            on_ready: called once the worker serves.
        """
        config, hello = self.config, self.hello
        hello.stages.extend(stage.stage for stage in stages)
        server = RpcServer(config.server_tls(), config.max_rpcs, access=config.access())
        for stage in stages:
            stage.add_to(server)
            stage.metrics.watch(stage.load)
        self.host = WorkerHost(
            server,
            hello,
            self._handle(stages),
            config.routers,
            config.credentials(),
            config.grace_period,
            config.advertise,
        )
        exporter = None
        if config.metrics_port != "off":
            exporter = MetricsServer(
                stages[0].metrics.registry,
                config.metrics_host,
                config.metrics_port,
                config.server_tls(),
                access=config.metrics_access(),
            )
            hello.metrics_address = exporter.address
        try:
            return await self.host.run(f"{config.host}:{config.port}", on_ready)
        finally:
            for stage in stages:
                await stage.close()
            if exporter is not None:
                exporter.close()

    def _handle(self, stages: Sequence[Stage]) -> WorkerHandle:
        def end_all(error: OverfillError) -> None:
            for stage in stages:
                stage.end_all(error)

        loads = [partial(self._load, stage) for stage in stages]
        return WorkerHandle(
            load=loads[-1],
            prefill_load=loads[0] if len(stages) > 1 else None,
            active=lambda: sum(stage.active for stage in stages),
            end_all=end_all,
            capacity=self.config.max_num_seqs,
            healthy=lambda: True,
            codec=common_pb2.KV_CODEC_RAW if self.hello.model.decoder_digest else common_pb2.KV_CODEC_UNSPECIFIED,
        )

    def _load(self, stage: Stage) -> decode_pb2.WorkerLoad:
        return stage.load().to_proto(self.block_size)

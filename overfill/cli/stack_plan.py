"""The plan of a stack: its processes, each with its complete settings. Starts nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from overfill.client import ClientTls
from overfill.routing.tier import DEFAULT_TIER
from overfill.rpc.addresses import reachable, split_address
from overfill.settings.config import ColocatedConfig, DecodeConfig, PrefillConfig, RouterConfig
from overfill.settings.tiers import TierSpec
from overfill.settings.worker_kinds import WorkerKind, WorkerSettings, WorkerStage


@dataclass(frozen=True, slots=True)
class PlannedWorker:
    """A worker with its complete settings."""

    kind: WorkerKind
    config: WorkerSettings

    @property
    def id(self) -> str:
        """Name of the worker in its stack."""
        return self.config.worker_id

    @property
    def tier(self) -> str | None:
        """Tier of a worker that decodes; None for prefill workers."""
        return (self.config.tier or DEFAULT_TIER) if isinstance(self.config, DecodeConfig) else None


@dataclass(frozen=True, slots=True)
class PlannedPool:
    """The workers of one kind and tier, at least one.

    Attributes:
        tier: as ``PlannedWorker.tier``.
    """

    kind: WorkerKind
    tier: str | None
    workers: tuple[PlannedWorker, ...]

    @property
    def config(self) -> WorkerSettings:
        """Settings of the first worker. The others differ in ids and ports."""
        return self.workers[0].config


@dataclass(frozen=True)
class StackPlan:
    """The processes of a stack, each with its complete settings. Routers have fixed ports, which they may share.

    Attributes:
        routers: settings of each router.
        workers: the workers, pool by pool.
        operator_tls: TLS files with which ``overfill up`` calls the routers; None means the routers' own.
        api_key: API key with which measurements send requests; None if the routers need none.
    """

    routers: tuple[RouterConfig, ...]
    workers: tuple[PlannedWorker, ...]
    operator_tls: ClientTls | None = None
    api_key: str | None = field(default=None, repr=False)

    @property
    def mock(self) -> bool:
        """True if the workers compute nothing."""
        return any(worker.config.engine == "mock" for worker in self.workers)

    @property
    def prefill(self) -> tuple[PrefillConfig, ...]:
        """Settings of the workers that only prefill."""
        return tuple(worker.config for worker in self.workers if isinstance(worker.config, PrefillConfig))

    @property
    def decode(self) -> tuple[DecodeConfig, ...]:
        """Settings of the workers that only decode."""
        decode = [worker.config for worker in self.workers if isinstance(worker.config, DecodeConfig)]
        return tuple(config for config in decode if not isinstance(config, ColocatedConfig))

    @property
    def colocated(self) -> tuple[ColocatedConfig, ...]:
        """Settings of the workers with both stages."""
        return tuple(worker.config for worker in self.workers if isinstance(worker.config, ColocatedConfig))

    @property
    def pools(self) -> tuple[PlannedPool, ...]:
        """The pools, in the order of their workers."""
        members: dict[tuple[WorkerKind, str | None], list[PlannedWorker]] = {}
        for worker in self.workers:
            members.setdefault((worker.kind, worker.tier), []).append(worker)
        return tuple(PlannedPool(kind, tier, tuple(workers)) for (kind, tier), workers in members.items())

    def of_stage(self, stage: WorkerStage) -> tuple[PlannedWorker, ...]:
        """Returns the workers that have the stage."""
        return tuple(worker for worker in self.workers if stage in worker.kind.stages)

    def of_tier(self, tier: str) -> tuple[DecodeConfig, ...]:
        """Returns the settings of the workers that decode in the tier."""
        return tuple(w.config for w in self.workers if isinstance(w.config, DecodeConfig) and w.tier == tier)

    def worker(self, id: str) -> PlannedWorker:
        """Returns the worker with this id."""
        return next(worker for worker in self.workers if worker.id == id)

    def with_configs(self, change: Callable[[PlannedWorker], WorkerSettings]) -> StackPlan:
        """Returns the plan with the settings of each worker replaced by ``change(worker)``."""
        return replace(self, workers=tuple(replace(worker, config=change(worker)) for worker in self.workers))

    @property
    def tiers(self) -> tuple[TierSpec, ...]:
        """The tiers, the default one first. With one pair there is one, called "default"."""
        return self.routers[0].tiers

    @property
    def named_tiers(self) -> bool:
        """True if the user has named the tiers; False with one pair."""
        return any(isinstance(worker.config, DecodeConfig) and worker.config.tier for worker in self.workers)

    @property
    def addresses(self) -> tuple[str, ...]:
        """gRPC addresses at which clients on this machine reach the routers: one if the routers share it."""
        return tuple(dict.fromkeys(f"{reachable(router.host)}:{router.port}" for router in self.routers))

    @property
    def join_addresses(self) -> tuple[str, ...]:
        """Address of each router process alone, at which workers join it."""
        return tuple(f"{reachable(router.host)}:{router.join_port or router.port}" for router in self.routers)

    def openai_urls(self, addresses: Sequence[str]) -> tuple[str, ...]:
        """Returns the base URLs of the OpenAI endpoints of the routers at these gRPC addresses, on any machine."""
        scheme = "http" if self.routers[0].tls_cert is None else "https"
        ports = {router.port: router.http for router in self.routers if router.http != "off"}
        places = map(split_address, addresses)
        return tuple(f"{scheme}://{host}:{ports[port]}/v1" for host, port in places if port in ports)

    @property
    def model(self) -> str:
        """Model name that clients request."""
        first = self.routers[0]
        return first.served_model_name[0] if first.served_model_name else Path(first.pair).name

    @property
    def client_tls(self) -> ClientTls | None:
        """TLS files with which ``overfill up`` calls the routers; None means no TLS."""
        return self.operator_tls or self.routers[0].client_tls()

    @property
    def secret(self) -> str | None:
        """The stack's secret, with which ``overfill up`` calls the routers; None without one."""
        shown = self.routers[0].credentials()
        return None if shown is None else shown.secret or None

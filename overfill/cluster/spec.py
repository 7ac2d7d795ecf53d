"""Specification of a stack on Ray: the arguments of the application builder, ``services.ray.app:build``.

Plain data, checked here. Knows nothing about Ray; ``application.py`` makes a Serve config from it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from overfill.routing.tier import DEFAULT_TIER
from overfill.rpc.addresses import is_wildcard
from overfill.settings.config import DecodeConfig, RouterConfig, ServiceConfig
from overfill.settings.config_file import flag_name
from overfill.settings.renamed import rename_fields
from overfill.settings.tiers import TierSpec, check_tier_name, default_tier
from overfill.settings.worker_kinds import KINDS, WorkerKind, WorkerSettings, WorkerStage

APPLICATION = "overfill"
"""Default name of the Serve application."""

ROUTER, PREFILL, DECODE, COLOCATED = "router", "prefill", "decode", "worker"
"""Names of the deployments. With several tiers, each has a deployment ``decode-TIER`` instead of ``decode``."""


def decode_deployment(tier: str) -> str:
    """Returns the name of the deployment of a tier's decode workers; the tier is empty with one pair."""
    return f"{DECODE}-{tier}" if tier else DECODE


def decode_tier(deployment: str) -> str | None:
    """Returns the tier of a deployment of decode workers, empty with one pair; None for other deployments."""
    name, _, tier = deployment.partition("-")
    return tier if name == DECODE else None


DRAIN_MARGIN = 10.0
"""Seconds after the grace period that a replica has to exit before Ray kills it."""

_FIELDS = {name for kind in (RouterConfig, *(kind.settings for kind in KINDS.values())) for name in kind.model_fields}

Settings = Annotated[
    dict[str, str | int | float | bool], AfterValidator(lambda settings: rename_fields(settings, _FIELDS))
]
"""Settings of services, by field name (``kv_memory: 512MiB``)."""

_Port = Annotated[int, Field(ge=0, le=65535)]
_Config = TypeVar("_Config", bound=ServiceConfig)


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


@dataclass(frozen=True, slots=True)
class WorkerPlace:
    """Identity of a worker: its id, the routers that it joins, and the address of its machine."""

    id: str
    routers: str
    node_ip: str


ANYWHERE = WorkerPlace("", "", "127.0.0.1")
"""Placeholder for reading a configuration without a worker."""


class PoolSpec(_Model):
    """Specification of one deployment.

    Attributes:
        replicas: number of replicas; with ``max_replicas``, the minimum and initial number.
        max_replicas: maximum number of replicas; None means that the number is fixed.
        num_cpus, num_gpus, resources: resources that Ray reserves for each replica. Fractions share a CPU or GPU, and
            the GPU's memory. A replica with ``num_gpus`` 0 sees no GPU.
        settings: settings of this deployment only.
    """

    replicas: int = Field(default=1, ge=1)
    max_replicas: int | None = Field(default=None, ge=1)
    num_cpus: float = Field(default=0.3, ge=0)
    num_gpus: float = Field(default=0.0, ge=0)
    resources: dict[str, float] = Field(default_factory=dict)
    settings: Settings = Field(default_factory=dict)

    @model_validator(mode="after")
    def _check_bounds(self) -> Self:
        if self.max_replicas is not None and self.max_replicas < self.replicas:
            raise ValueError(f"max_replicas {self.max_replicas} is less than replicas {self.replicas}")
        return self

    @property
    def max_replicas_total(self) -> int:
        """Maximum number of replicas, not counting those that replace others."""
        return self.max_replicas or self.replicas


class RouterSpec(PoolSpec):
    """Specification of the routers. Each takes the first of the ports that is free on its machine, or waits for one.

    Attributes:
        ports: gRPC ports; 0 means any free one.
        http_ports: ports of the OpenAI endpoint, one for each of ``ports``; empty means no endpoint.
    """

    num_cpus: float = Field(default=0.2, ge=0)
    ports: tuple[_Port, ...] = (7600,)
    http_ports: tuple[_Port, ...] = ()

    @model_validator(mode="after")
    def _check_fixed(self) -> Self:
        if self.max_replicas is not None:
            raise ValueError("max_replicas: the number of routers is fixed; remove it")
        if not self.ports:
            raise ValueError("ports: give at least one; 0 means any free port")
        if self.http_ports and len(self.http_ports) != len(self.ports):
            raise ValueError(
                f"http_ports: got {len(self.http_ports)}; give one for each of the {len(self.ports)} ports, or none"
            )
        return self


class ColocatedPool(PoolSpec):
    """Specification of the workers with both stages. They decode in the default tier, and their number is fixed."""

    stages: Literal["both"] = "both"


class TierPool(PoolSpec):
    """Specification of a tier: a decoder, and the deployment of its decode workers.

    Attributes:
        replicas: as in ``PoolSpec``; 0 if only workers with both stages decode in the tier.
        pair: name of a pair, or a pair's folder, which must exist on every machine of the cluster.
        fallback: tier in which answers go on when this one has no worker left; empty means that they wait.
        ttft_objective, itl_objective: objectives of this tier, in seconds; None means the routers'.
    """

    replicas: int = Field(default=1, ge=0)
    pair: str
    fallback: str = ""
    ttft_objective: float | None = Field(default=None, gt=0)
    itl_objective: float | None = Field(default=None, gt=0)

    def tier(self, name: str) -> TierSpec:
        """Returns the tier as routers read it. Raises ValueError."""
        check_tier_name(name)
        own = {"fallback": self.fallback or None, "ttft-objective": self.ttft_objective}
        own |= {"itl-objective": self.itl_objective, **{flag_name(key): v for key, v in self.settings.items()}}
        settings = {key: str(value) for key, value in own.items() if value is not None}
        tier = TierSpec(name, self.pair, self.replicas, settings)
        if "," in self.pair or ";" in str(tier):
            raise ValueError(f"decoders.{name}: neither pair nor settings may have a semicolon, nor the pair a comma")
        return tier


@dataclass(frozen=True, slots=True)
class StackPool:
    """One deployment.

    Attributes:
        kind: kind of the workers; None for routers.
        tier: tier in which they decode; empty with one pair, and for those that do not decode.
    """

    spec: PoolSpec
    kind: WorkerKind | None = None
    tier: str = ""


class StackSpec(_Model):
    """Specification of a whole stack.

    Attributes:
        pair: name of a pair, or a pair's folder, which must exist on every machine of the cluster.
        decoders: the tiers by name, each with its own pair; empty means one tier, of ``pair`` and ``decode``.
        worker: workers with both stages. With them, ``prefill`` and ``decode`` have deployments only if they are given.
        settings: settings for all deployments that have them.
        log_dir: folder for one log file per replica; None means Ray's log.
        health_check_period: seconds between checks of a replica's health service. Ray replaces a replica after three
            failed checks in a row, or when its process has died.
        health_check_timeout: seconds to wait for the answer of a check.
    """

    pair: str = "default"
    settings: Settings = Field(default_factory=dict)
    log_dir: str | None = None
    health_check_period: float = Field(default=2.0, gt=0)
    health_check_timeout: float = Field(default=10.0, gt=0)
    router: RouterSpec = Field(default_factory=RouterSpec)
    worker: ColocatedPool | None = None
    prefill: PoolSpec | None = None
    decode: PoolSpec | None = None
    decoders: dict[str, TierPool] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _add_pools(cls, data: Any) -> Any:
        """Without workers of both stages, each stage has a deployment."""
        if not isinstance(data, Mapping) or data.get("worker") is not None:
            return data
        return {"prefill": {}, **({} if data.get("decoders") else {"decode": {}}), **data}

    @model_validator(mode="after")
    def _check_settings(self) -> Self:
        if self.decoders and (given := sorted({"pair", "decode"} & self.model_fields_set)):
            raise ValueError(f"decoders: each has its own pair and replicas: remove {' and '.join(given)}")
        if self.worker is not None:
            self._check_colocated()
        fields = [kind.settings.model_fields for kind in KINDS.values()]
        if unknown := sorted(self.settings.keys() - {*RouterConfig.model_fields}.union(*fields)):
            raise ValueError(
                f"settings: {', '.join(unknown)}: no service has such a setting; see `overfill config show`"
            )
        for stage in ("prefill", "decode"):
            if not self._members(stage):
                raise ValueError(f"{stage}: no worker has this stage; give the section, or `worker`")
        self.router_config()
        for name in self.pools.keys() - {ROUTER}:
            self.worker_config(name)
        return self

    def _check_colocated(self) -> None:
        if scaled := sorted(name for name, pool in self.pools.items() if pool.spec.max_replicas is not None):
            raise ValueError(
                f"worker: a stack of workers with both stages has a fixed number of replicas: remove max_replicas of "
                f"{' and '.join(scaled)}, or `worker`"
            )

    @property
    def pools(self) -> dict[str, StackPool]:
        """Deployments by name."""
        pools = {ROUTER: StackPool(self.router)}
        given: list[tuple[str, str, PoolSpec | None]] = [
            (COLOCATED, self._default_tier, self.worker), (PREFILL, "", self.prefill), (DECODE, "", self.decode),
            *((DECODE, tier, pool) for tier, pool in self.decoders.items() if pool.replicas),
        ]  # fmt: skip
        for kind, tier, spec in given:
            if spec is not None:
                name = decode_deployment(tier) if kind == DECODE else kind
                pools[name] = StackPool(spec, KINDS[kind], tier)
        return pools

    def _members(self, stage: WorkerStage) -> int:
        """The initial number of workers that have the stage."""
        return sum(pool.spec.replicas for pool in self.pools.values() if pool.kind and stage in pool.kind.stages)

    @property
    def tiers(self) -> tuple[TierSpec, ...]:
        """The tiers as routers read them; empty with one pair, unless its decoder is loaded in another format."""
        tiers = []
        for name, pool in (self.decoders or {"": TierPool(pair=self.pair)}).items():
            decoding = {key: one for key, one in self.pools.items() if decodes(one) and one.tier == name}
            if not decoding:
                raise ValueError(
                    f"decoders.{name}.replicas: at least 1; only the default tier may have none, with `worker`"
                )
            count = sum(one.spec.replicas for one in decoding.values())
            tier = replace(pool.tier(name or DEFAULT_TIER), count=count)
            # Shared settings count too; routers refuse workers that have others than the tier.
            config = self.worker_config(next(iter(decoding)))
            format = config.decoder_settings if isinstance(config, DecodeConfig) else {}
            if name or "quantize" in format:
                tiers.append(replace(tier, settings={**tier.settings, **format}))
        return tuple(tiers)

    @property
    def _default_tier(self) -> str:
        """Name of the default tier; empty with one pair."""
        if not self.decoders:
            return ""
        settings = self.settings | self.router.settings
        name = default_tier([*self.decoders], str(settings.get("default_tier", "")))
        # The router's settings report a default tier that does not exist.
        return name if name in self.decoders else next(iter(self.decoders))

    @property
    def default_pair(self) -> str:
        """The default tier's pair, of which prefill workers and routers use the full model and the tokenizer."""
        return self.decoders[self._default_tier].pair if self.decoders else self.pair

    def with_pairs(self, resolve: Callable[[str], str]) -> StackSpec:
        """Returns the specification with each pair replaced by ``resolve(pair)``."""
        if not self.decoders:
            return self.model_copy(update={"pair": resolve(self.pair)})
        decoders = {name: pool.model_copy(update={"pair": resolve(pool.pair)}) for name, pool in self.decoders.items()}
        return self.model_copy(update={"decoders": decoders})

    @property
    def scales(self) -> bool:
        """True if the size of a pool may change."""
        return any(pool.spec.max_replicas is not None for pool in self.pools.values())

    @property
    def grace_period(self) -> float:
        """Seconds that running requests have when a replica drains: the maximum over the deployments."""
        workers = (self.worker_config(name) for name in self.pools if name != ROUTER)
        return max(self.router_config().grace_period, *(config.grace_period for config in workers))

    def router_config(self, index: int = 0, node_ip: str = ANYWHERE.node_ip) -> RouterConfig:
        """Returns the settings of the router on ``ports[index]``. Raises ValueError naming a wrong setting.

        Args:
            node_ip: address of the router's machine.
        """
        own = self._metrics_host(self.router, node_ip) | {
            "port": self.router.ports[index],
            "expect_prefill": self._members("prefill"),
            "expect_decode": self._members("decode"),
            "pair": self.default_pair,
            "decoders": ";".join(map(str, self.tiers)) or None,
        }
        if self.router.http_ports:
            own["http"] = self.router.http_ports[index]
        return self._configure(RouterConfig, self.router, own)

    def worker_config(self, deployment: str, worker: WorkerPlace = ANYWHERE) -> WorkerSettings:
        """Returns the settings of a worker of ``deployment``. Raises ValueError naming a wrong setting."""
        pool = self.pools[deployment]
        assert pool.kind is not None, "routers are no workers"
        own = self._placed(pool.spec, worker) | {"pair": self.default_pair}
        if 0 < pool.spec.num_gpus < 1 and "gpu_share" not in self.settings | pool.spec.settings:
            own["gpu_share"] = pool.spec.num_gpus
        if pool.tier:
            tier = self.decoders[pool.tier]
            objectives = {"ttft_objective": tier.ttft_objective, "itl_objective": tier.itl_objective}
            own |= {"pair": tier.pair, "tier": pool.tier}
            own |= {name: value for name, value in objectives.items() if name in pool.kind.settings.model_fields}
        return self._configure(pool.kind.settings, pool.spec, own)

    def _placed(self, pool: PoolSpec, worker: WorkerPlace) -> dict[str, object]:
        settings = self.settings | pool.settings
        own = self._metrics_host(pool, worker.node_ip) | {"worker_id": worker.id, "routers": worker.routers}
        if is_wildcard(str(settings.get("host", ""))) and "advertise" not in settings:
            own["advertise"] = worker.node_ip
        return own

    def _metrics_host(self, pool: PoolSpec, node_ip: str) -> dict[str, object]:
        """Replaces a wildcard by the machine's address, so that routers' ``/targets`` lists addresses to connect to."""
        settings = self.settings | pool.settings
        return {"metrics_host": node_ip} if is_wildcard(str(settings.get("metrics_host", ""))) else {}

    def _configure(self, kind: type[_Config], pool: PoolSpec, own: dict[str, object]) -> _Config:
        shared = {name: value for name, value in self.settings.items() if name in kind.model_fields}
        return kind.of({**shared, **pool.settings, **{name: value for name, value in own.items() if value is not None}})


def decodes(pool: StackPool) -> bool:
    """True if the workers of the deployment decode."""
    return pool.kind is not None and "decode" in pool.kind.stages

"""Specification of a stack on Ray: the arguments of the application builder, ``services.ray.app:build``.

Plain data, checked here. Knows nothing about Ray; ``application.py`` makes a Serve config from it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Annotated, Self, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from overfill.routing.tier import DEFAULT_TIER
from overfill.rpc.addresses import is_wildcard
from overfill.settings.config import DecodeConfig, PrefillConfig, RouterConfig, ServiceConfig
from overfill.settings.config_file import flag_name
from overfill.settings.mock import MockDecodeConfig, MockPrefillConfig
from overfill.settings.renamed import rename_fields
from overfill.settings.tiers import TierSpec, check_tier_name, default_tier

APPLICATION = "overfill"
"""Default name of the Serve application."""

ROUTER, PREFILL, DECODE = "router", "prefill", "decode"
"""Names of the deployments. With several tiers, each has a deployment ``decode-TIER`` instead of ``decode``."""

DRAIN_MARGIN = 10.0
"""Seconds after the grace period that a replica has to exit before Ray kills it."""

_FIELDS = {*RouterConfig.model_fields, *MockPrefillConfig.model_fields, *MockDecodeConfig.model_fields}

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
        num_cpus, num_gpus, resources: resources that Ray reserves for each replica. Fractions share a CPU or GPU.
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


class TierPool(PoolSpec):
    """Specification of a tier: a decoder, and the deployment of its decode workers.

    Attributes:
        pair: name of a pair, or a pair's folder, which must exist on every machine of the cluster.
        fallback: tier in which answers go on when this one has no worker left; empty means that they wait.
        ttft_objective, itl_objective: objectives of this tier, in seconds; None means the routers'.
    """

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


class StackSpec(_Model):
    """Specification of a whole stack.

    Attributes:
        pair: name of a pair, or a pair's folder, which must exist on every machine of the cluster.
        decoders: the tiers by name, each with its own pair; empty means one tier, of ``pair`` and ``decode``.
        mock: run workers that compute nothing (``services.mock``), for trials of everything else.
        settings: settings for all deployments that have them.
        log_dir: folder for one log file per replica; None means Ray's log.
        health_check_period: seconds between checks of a replica's health service. Ray replaces a replica after three
            failed checks in a row, or when its process has died.
        health_check_timeout: seconds to wait for the answer of a check.
    """

    pair: str = "default"
    mock: bool = False
    settings: Settings = Field(default_factory=dict)
    log_dir: str | None = None
    health_check_period: float = Field(default=2.0, gt=0)
    health_check_timeout: float = Field(default=10.0, gt=0)
    router: RouterSpec = Field(default_factory=RouterSpec)
    prefill: PoolSpec = Field(default_factory=PoolSpec)
    decode: PoolSpec = Field(default_factory=PoolSpec)
    decoders: dict[str, TierPool] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _check_settings(self) -> Self:
        if self.decoders and (given := sorted({"pair", "decode"} & self.model_fields_set)):
            raise ValueError(f"decoders: each has its own pair and replicas: remove {' and '.join(given)}")
        known = {*RouterConfig.model_fields, *self._prefill_kind().model_fields, *self._decode_kind().model_fields}
        if unknown := sorted(self.settings.keys() - known):
            raise ValueError(
                f"settings: {', '.join(unknown)}: no service has such a setting; see `overfill config show`"
            )
        self.router_config()
        for name in self.pools.keys() - {ROUTER}:
            self.worker_config(name)
        return self

    @property
    def pools(self) -> dict[str, PoolSpec]:
        """Deployments by name."""
        decoders: dict[str, PoolSpec] = {f"{DECODE}-{name}": pool for name, pool in self.decoders.items()}
        return {ROUTER: self.router, PREFILL: self.prefill, **(decoders or {DECODE: self.decode})}

    @property
    def tiers(self) -> tuple[TierSpec, ...]:
        """The tiers as routers read them; empty with one pair, unless its decoder is loaded in another format."""
        named = self.decoders or {"": TierPool(pair=self.pair, replicas=self.decode.replicas)}
        tiers = []
        for name, pool in named.items():
            tier = pool.tier(name or DEFAULT_TIER)
            # Shared settings count too; routers refuse workers that have others than the tier.
            format = self.decode_config(tier=name).decoder_settings
            if name or "quantize" in format:
                tiers.append(replace(tier, settings={**tier.settings, **format}))
        return tuple(tiers)

    @property
    def default_pair(self) -> str:
        """The default tier's pair, of which prefill workers and routers use the full model and the tokenizer."""
        if not self.decoders:
            return self.pair
        settings = self.settings | self.router.settings
        name = default_tier([*self.decoders], str(settings.get("default_tier", "")))
        # The router's settings report a default tier that does not exist.
        return self.decoders.get(name, next(iter(self.decoders.values()))).pair

    def with_pairs(self, resolve: Callable[[str], str]) -> StackSpec:
        """Returns the specification with each pair replaced by ``resolve(pair)``."""
        if not self.decoders:
            return self.model_copy(update={"pair": resolve(self.pair)})
        decoders = {name: pool.model_copy(update={"pair": resolve(pool.pair)}) for name, pool in self.decoders.items()}
        return self.model_copy(update={"decoders": decoders})

    @property
    def scales(self) -> bool:
        """True if the size of a pool may change."""
        return any(pool.max_replicas is not None for pool in self.pools.values())

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
            "expect_prefill": self.prefill.replicas,
            "expect_decode": sum(pool.replicas for name, pool in self.pools.items() if name.startswith(DECODE)),
            "pair": self.default_pair,
            "decoders": ";".join(map(str, self.tiers)) or None,
        }
        if self.router.http_ports:
            own["http"] = self.router.http_ports[index]
        return self._configure(RouterConfig, self.router, own)

    def worker_config(self, deployment: str, worker: WorkerPlace = ANYWHERE) -> PrefillConfig | DecodeConfig:
        """Returns the settings of a worker of ``deployment``. Raises ValueError naming a wrong setting."""
        if deployment == PREFILL:
            return self.prefill_config(worker)
        return self.decode_config(worker, deployment.removeprefix(DECODE).removeprefix("-"))

    def prefill_config(self, worker: WorkerPlace = ANYWHERE) -> PrefillConfig:
        """Returns the settings of a prefill worker. Raises ValueError naming a wrong setting."""
        own = self._placed(self.prefill, worker) | {"pair": self.default_pair}
        return self._configure(self._prefill_kind(), self.prefill, own)

    def decode_config(self, worker: WorkerPlace = ANYWHERE, tier: str = "") -> DecodeConfig:
        """Returns the settings of a decode worker of ``tier``, which is empty with one pair. Raises ValueError."""
        if not tier:
            own = self._placed(self.decode, worker) | {"pair": self.pair}
            return self._configure(self._decode_kind(), self.decode, own)
        pool = self.decoders[tier]
        return self._configure(
            self._decode_kind(), pool, self._placed(pool, worker) | {"pair": pool.pair, "tier": tier}
        )

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

    def _prefill_kind(self) -> type[PrefillConfig]:
        return MockPrefillConfig if self.mock else PrefillConfig

    def _decode_kind(self) -> type[DecodeConfig]:
        return MockDecodeConfig if self.mock else DecodeConfig

    def _configure(self, kind: type[_Config], pool: PoolSpec, own: dict[str, object]) -> _Config:
        shared = {name: value for name, value in self.settings.items() if name in kind.model_fields}
        return kind.of({**shared, **pool.settings, **own})

"""What a stack on Ray consists of: the arguments of the application builder, ``services.ray.app:build``.

Plain data, checked here. Knows nothing of Ray; ``application.py`` makes a Serve config of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Self, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from overfill.settings.config import DecodeConfig, PrefillConfig, RouterConfig, ServiceConfig
from overfill.settings.mock import MockDecodeConfig, MockPrefillConfig
from overfill.settings.renamed import rename_fields
from overfill.settings.values import is_wildcard

APPLICATION = "overfill"
"""Name of the Serve application, unless another is given."""

ROUTER, PREFILL, DECODE = "router", "prefill", "decode"
"""Names of the three deployments."""

DRAIN_MARGIN = 10.0
"""Seconds beyond the grace period for a replica to leave by itself, before Ray kills it."""

_FIELDS = {*RouterConfig.model_fields, *MockPrefillConfig.model_fields, *MockDecodeConfig.model_fields}

Settings = Annotated[
    dict[str, str | int | float | bool], AfterValidator(lambda settings: rename_fields(settings, _FIELDS))
]
"""Fields of the configuration classes by name (``kv_memory: 512MiB``), as the services' flags."""

_Port = Annotated[int, Field(ge=0, le=65535)]
_Config = TypeVar("_Config", bound=ServiceConfig)


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


@dataclass(frozen=True, slots=True)
class WorkerPlace:
    """Which worker it is, the routers that it joins, and the address of its machine."""

    id: str
    routers: str
    node_ip: str


ANYWHERE = WorkerPlace("", "", "127.0.0.1")
"""For looking at a configuration before there is a worker."""


class PoolSpec(_Model):
    """One deployment.

    Attributes:
        replicas: how many there are; with ``max_replicas``, how many at least and at the start.
        max_replicas: most replicas; None: the number is fixed.
        num_cpus, num_gpus, resources: what Ray sets aside for each replica. Fractions share a CPU or GPU.
        settings: of this deployment alone.
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
        """Replicas that there may ever be, but for those that take the place of others."""
        return self.max_replicas or self.replicas


class RouterSpec(PoolSpec):
    """The routers. Each takes the first of the ports that is free on its machine, or waits for one.

    Attributes:
        ports: for gRPC; 0 is any free one.
        http_ports: for the OpenAI endpoint, one for each of ``ports``; empty: there is none.
    """

    num_cpus: float = Field(default=0.2, ge=0)
    ports: tuple[_Port, ...] = (7600,)
    http_ports: tuple[_Port, ...] = ()

    @model_validator(mode="after")
    def _check_fixed(self) -> Self:
        if self.max_replicas is not None:
            raise ValueError("the number of routers is fixed: leave max_replicas out")
        if not self.ports:
            raise ValueError("ports: give one at least, which may be 0")
        if self.http_ports and len(self.http_ports) != len(self.ports):
            raise ValueError(f"http_ports: give as many as ports, {len(self.ports)}, or none")
        return self


class StackSpec(_Model):
    """A whole stack.

    Attributes:
        pair: a named pair, or a folder that every machine of the cluster has.
        mock: workers that compute nothing (``services.mock``), for trials of everything else.
        settings: of all deployments that have them.
        log_dir: a folder for one log file per replica; None: Ray's log.
        health_check_period, health_check_timeout: seconds between looks at each replica's own health service, and
            for its answer. Three unanswered ones in a row, or one dead process, and it is replaced.
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

    @model_validator(mode="after")
    def _check_settings(self) -> Self:
        known = {*RouterConfig.model_fields, *self._prefill_kind().model_fields, *self._decode_kind().model_fields}
        if unknown := sorted(self.settings.keys() - known):
            raise ValueError(f"settings: {', '.join(unknown)}: no service has such a setting")
        for config in (self.router_config, self.prefill_config, self.decode_config):
            config()
        return self

    @property
    def pools(self) -> dict[str, PoolSpec]:
        """The deployments by name."""
        return {ROUTER: self.router, PREFILL: self.prefill, DECODE: self.decode}

    @property
    def scales(self) -> bool:
        """Whether some pool's size may change."""
        return any(pool.max_replicas is not None for pool in self.pools.values())

    @property
    def grace_period(self) -> float:
        """Seconds that running requests have when a replica leaves: the longest of the three deployments'."""
        configs = (self.router_config(), self.prefill_config(), self.decode_config())
        return max(config.grace_period for config in configs)

    def router_config(self, index: int = 0) -> RouterConfig:
        """Of the router on the port of that index. Raises ValueError naming what is wrong."""
        own: dict[str, object] = {
            "port": self.router.ports[index],
            "expect_prefill": self.prefill.replicas,
            "expect_decode": self.decode.replicas,
        }
        if self.router.http_ports:
            own["http"] = self.router.http_ports[index]
        return self._configure(RouterConfig, self.router, own)

    def prefill_config(self, worker: WorkerPlace = ANYWHERE) -> PrefillConfig:
        """Of the prefill worker at ``worker``. Raises ValueError naming what is wrong."""
        return self._configure(self._prefill_kind(), self.prefill, self._placed(self.prefill, worker))

    def decode_config(self, worker: WorkerPlace = ANYWHERE) -> DecodeConfig:
        """As ``prefill_config``."""
        return self._configure(self._decode_kind(), self.decode, self._placed(self.decode, worker))

    def _placed(self, pool: PoolSpec, worker: WorkerPlace) -> dict[str, object]:
        settings = self.settings | pool.settings
        own: dict[str, object] = {"worker_id": worker.id, "routers": worker.routers}
        if is_wildcard(str(settings.get("host", ""))) and "advertise" not in settings:
            own["advertise"] = worker.node_ip
        return own

    def _prefill_kind(self) -> type[PrefillConfig]:
        return MockPrefillConfig if self.mock else PrefillConfig

    def _decode_kind(self) -> type[DecodeConfig]:
        return MockDecodeConfig if self.mock else DecodeConfig

    def _configure(self, kind: type[_Config], pool: PoolSpec, own: dict[str, object]) -> _Config:
        shared = {name: value for name, value in self.settings.items() if name in kind.model_fields}
        given: dict[str, object] = {"pair": self.pair, **shared, **pool.settings}
        return kind.of(given | own)

"""The one document that describes a stack. ``overfill up`` prints and reads it, and both runners start what it says.

Plain data, checked here. It knows nothing about how processes start: ``process_runner`` and ``ray`` do.
"""

from __future__ import annotations

import datetime
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from overfill.routing.tier import DEFAULT_TIER
from overfill.rpc.access import NAME, Role
from overfill.rpc.addresses import is_wildcard, split_address
from overfill.rpc.certificates import role_files
from overfill.settings.config import DecodeConfig, RouterConfig, ServiceConfig
from overfill.settings.config_file import StrictConstructor, all_names, nearest
from overfill.settings.reader import BadSettings
from overfill.settings.tiers import MAX_REPLICAS, PoolSpec, TierSpec, default_tier
from overfill.settings.values import Name, Revision, check_text
from overfill.settings.worker_kinds import KINDS, WorkerKind, WorkerSettings, WorkerStage

APPLICATION = "overfill"
"""Default name of the application on Ray."""

DEFAULT_PAIR = "default"
"""Pair of a stack that names none."""

ROUTER, PREFILL, DECODE, COLOCATED = "router", "prefill", "decode", "colocated"
"""Kinds of pools, with which their names begin (``pool_name``)."""

SUFFIXES = (".yaml", ".yml", ".json")
"""Ends of the names of files that hold a document."""

DRAIN_MARGIN = 10.0
"""Seconds after the grace period that a process on Ray has to exit before Ray kills it."""

SET_BY_STACK = {
    "pair", "port", "data_port", "http", "share_port", "join_port", "worker_id", "routers", "tier", "tiers",
    "expect_prefill", "expect_decode", "revision", "canary_revision", "canary_pair", "canary_tiers", "canary_percent",
    "probe_port", "probe_host",
}  # fmt: skip
"""Settings that each process gets from the stack's other fields, so that a value of theirs would have no effect. Its
processes serve no probes, because the runner watches them itself."""

_ONLY_ON_RAY = {"name", "ray_address", "health_check_period", "health_check_timeout"}
_RESERVED = {"num_cpus", "num_gpus", "resources"}
"""Fields of a stack, and of its pools, that plain processes do not use."""

_Port = Annotated[int, Field(ge=0, le=65535)]
_Config = TypeVar("_Config", bound=ServiceConfig)

RevisionName = Annotated[
    Revision, BeforeValidator(lambda name: str(name) if isinstance(name, datetime.date) else name)
]  # YAML reads 2026-11-30 as a date


def pool_name(kind: str, tier: str = "", revision: str = "") -> str:
    """Returns the name of a pool, such as ``decode``, ``decode-fast`` or ``decode-fast-r2``.

    Args:
        tier: tier of decode workers; empty with one pair.
        revision: revision of the workers' pair; empty without a name.
    """
    return "-".join(filter(None, (kind, tier, revision)))


def kind_of(pool: str) -> WorkerKind:
    """Returns the kind of a pool's workers."""
    return KINDS[pool.partition("-")[0]]


@dataclass(frozen=True, slots=True)
class WorkerPlace:
    """Identity of a worker: its id, the routers that it joins, and the address of its machine."""

    id: str
    routers: str
    node_ip: str


ANYWHERE = WorkerPlace("", "", "127.0.0.1")
"""Placeholder for reading a configuration without a worker."""


class RouterSpec(PoolSpec):
    """The routers. Each takes the first of the ports that is free on its machine, or waits for one.

    Attributes:
        ports: gRPC ports; 0 means any free one. Plain processes share a single port.
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


class CanarySpec(BaseModel):
    """The new revision of a stack during a rollout, with its own pair and its own workers.

    Attributes:
        revision: name of the new revision. The stack's own is the old one.
        percent: share of new conversations that the new revision gets until ``overfill rollout`` changes it, 0 to 100.
        pair: pair of the new revision, as of the stack; not with ``tiers``.
        tiers: tiers of the new revision by name, the same names as those of the stack; empty with one pair.
        prefill, decode: workers of the new revision, which have one stage each.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    revision: RevisionName = Field(min_length=1)
    percent: float = Field(default=0.0, ge=0, le=100)
    pair: str = ""
    tiers: dict[str, TierSpec] = Field(default_factory=dict)
    prefill: PoolSpec = Field(default_factory=PoolSpec)
    decode: PoolSpec | None = None

    _check_text = field_validator("*", mode="before")(check_text)

    @model_validator(mode="before")
    @classmethod
    def _complete(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        if data.get(COLOCATED) is not None:
            raise ValueError("colocated: workers of a new revision have one stage: give `prefill` and `decode` instead")
        data = _with_named_tiers(data)
        return data if data["tiers"] else {DECODE: {}, **data}

    @model_validator(mode="after")
    def _check_pair(self) -> Self:
        if not self.pair and not self.tiers:
            raise ValueError("pair: missing; name the pair of the new revision, or give `tiers`")
        return self


class StackSpec(BaseModel):
    """A whole stack.

    Attributes:
        runner: ``ray`` runs the stack on Ray Serve, which replaces lost workers; ``processes`` runs plain processes.
        name: name of the application on Ray, at most 256 printable characters.
        ray_address: Ray cluster to join, as for ``ray.init``; None starts one on this machine.
        revision: name of this state of the weights, such as ``r1``; empty means none. Names of pools end in it.
        pair: name of a pair, or a pair's folder, which must exist on every machine of the stack.
        tiers: the tiers by name, each with its own pair; empty means one tier, of ``pair`` and ``decode``.
        canary: during a rollout, the new revision, which is served beside this one.
        router: the routers.
        colocated: workers with both stages. With them, ``prefill`` and ``decode`` exist only if they are given.
        prefill, decode: workers with one stage.
        settings: settings for all processes that have them, by field. With plain processes, ``metrics_port`` is that of
            the first router, and the others have the next ports.
        tls: folder with a certificate per role, as ``overfill certs`` makes it; replaces the settings of TLS.
        new_secret: the runner makes the secret that the processes send each other.
        log_dir: folder for one log file per process; None means stderr.
        health_check_period: seconds between checks of a process by Ray. Ray replaces a process after three failed
            checks in a row, or when it has died.
        health_check_timeout: seconds to wait for the answer of a check.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    runner: Literal["ray", "processes"] = "ray"
    name: Name = APPLICATION
    ray_address: str | None = None
    revision: RevisionName = ""
    pair: str = DEFAULT_PAIR
    tiers: dict[str, TierSpec] = Field(default_factory=dict)
    canary: CanarySpec | None = None
    router: RouterSpec = Field(default_factory=RouterSpec)
    colocated: PoolSpec | None = None
    prefill: PoolSpec | None = None
    decode: PoolSpec | None = None
    settings: dict[str, Any] = Field(default_factory=dict)
    tls: str | None = None
    new_secret: bool = False
    log_dir: str | None = None
    health_check_period: float = Field(default=2.0, gt=0)
    health_check_timeout: float = Field(default=10.0, gt=0)

    _check_text = field_validator("*", mode="before")(check_text)

    @model_validator(mode="before")
    @classmethod
    def _complete(cls, data: Any) -> Any:
        """Gives each stage a pool unless there are colocated workers, and each tier its name."""
        if not isinstance(data, Mapping):
            return data
        data = _with_named_tiers(data)
        if data.get("colocated") is not None:
            return data
        return {"prefill": {}, **({} if data["tiers"] else {"decode": {}}), **data}

    @model_validator(mode="after")
    def _check_settings(self) -> Self:
        self._check_revisions()
        for part in self._parts:
            self._check_tiers(part)
        for name, pool in self.deployments.items():
            if pool.most > MAX_REPLICAS:
                raise ValueError(f"{self._place(name)}: got {pool.most} replicas; a pool has at most {MAX_REPLICAS}")
        self._check_runner()
        for stage in ("prefill", "decode"):
            if not self.members(stage):
                raise ValueError(f"{stage}: no worker has this stage; give the section, or `colocated`")
        fields = [kind_of(name).settings.model_fields for name in self.pools]
        known = {*RouterConfig.model_fields}.union(*fields) - {"config"}
        if unknown := sorted(self.settings.keys() - known):
            missing = "no process of this stack has such a setting"
            hints = (f"settings.{name}: {missing}; {nearest(name, known, all_names())}" for name in unknown)
            raise ValueError("; ".join(hints))
        for place, settings in (("settings", self.settings), *((n, p.settings) for n, p in self.deployments.items())):
            if made := sorted(settings.keys() & SET_BY_STACK):
                raise ValueError(f"{place}: {', '.join(made)}: the stack sets this for each process itself: remove it")
        self.router_config()
        self._check_ranks()
        engines = {name: self.worker_config(name).engine for name in self.pools}
        if "mock" in engines.values() and len(set(engines.values())) > 1:
            raise ValueError(
                "engine mock computes nothing, so all workers have it or none: got "
                + ", ".join(f"{engine} for {name}" for name, engine in engines.items())
            )
        self._check_formats()
        self.check_apart(metrics=self.runner == "processes")
        return self

    def _check_revisions(self) -> None:
        """Raises ValueError if the name of a pool would not say its tier and its revision."""
        names = [part.revision for part in self._parts if part.revision]
        if len(names) > len(set(names)):
            raise ValueError(f"canary.revision: got {names[0]!r}, which is the stack's: give the new revision another")
        tiers = dict.fromkeys(tier for part in self._parts for tier in part.tiers)
        for name in names:
            others = [("revision", other) for other in names if other != name] + [("tier", tier) for tier in tiers]
            for kind, other in others:
                if other == name or other.endswith(f"-{name}"):
                    raise ValueError(
                        f"revision {name!r}: the {kind} {other!r} ends in the same way, so that a pool "
                        f"{pool_name(DECODE, other)!r} could be of either: give one of them another name"
                    )

    def _check_tiers(self, part: StackSpec | CanarySpec) -> None:
        """Raises ValueError if a revision's tiers lack workers, or have what has no effect."""
        place = "" if part is self else "canary."
        if part.tiers and (given := sorted({"pair", "decode"} & part.model_fields_set)):
            raise ValueError(f"{place}tiers: each has its own pair and replicas: remove {' and '.join(given)}")
        for name, tier in part.tiers.items():
            if not any(pool.part is part and pool.tier == name for pool in self._worker_pools.values()):
                otherwise = "; only the default tier may have none, with `colocated`" if part is self else ""
                raise ValueError(
                    f"{place}tiers.{name}.replicas: the number of decode workers must be at least 1, got 0{otherwise}"
                )
            unused = tier.model_dump(exclude_defaults=True).keys() & PoolSpec.model_fields.keys() - {"replicas"}
            if unused and not tier.replicas:
                raise ValueError(
                    f"{place}tiers.{name}: {', '.join(sorted(unused))}: the tier has no workers of its own, so this "
                    "has no effect: set it in `colocated`, whose workers decode in the tier, or remove it"
                )

    def _check_runner(self) -> None:
        """Raises ValueError for fields that the runner does not use, or cannot meet."""
        scaled = sorted(name for name, pool in self.pools.items() if pool.max_replicas is not None)
        if scaled and self.colocated is not None:
            raise ValueError(
                f"colocated: a stack of colocated workers has a fixed number of replicas: remove max_replicas of "
                f"{' and '.join(scaled)}, or `colocated`"
            )
        if self.runner == "ray":
            return
        if scaled:
            raise ValueError(f"runner processes: only Ray scales pools: remove max_replicas of {' and '.join(scaled)}")
        unused = sorted(self.model_dump(exclude_defaults=True).keys() & _ONLY_ON_RAY)
        for name, pool in self.deployments.items():
            own = pool.model_dump(exclude_defaults=True).keys() & _RESERVED
            unused += [f"{self._place(name)}.{field}" for field in sorted(own)]
        if unused:
            raise ValueError(f"runner processes: only Ray uses {', '.join(unused)}: remove this, or set runner to ray")
        routers, ports = self.router.replicas, len(self.router.ports)
        if 1 < ports < routers:
            raise ValueError(
                f"router.ports: got {ports} for {routers} routers; give 1, which they share, or one for each"
            )

    def _check_ranks(self) -> None:
        """Raises ValueError if Ray would reserve another number of GPUs for a worker than one for each of its ranks."""
        for name, pool in self.pools.items():
            ranks = self.worker_config(name).tensor_parallel_size
            if ranks > 1 and pool.num_gpus not in (0, ranks):
                raise ValueError(
                    f"{self._place(name)}.num_gpus: got {pool.num_gpus:g} with tensor_parallel_size {ranks}: give "
                    f"{ranks}, a GPU for each rank, or 0 for ranks on CPUs"
                )

    def _check_formats(self) -> None:
        """Raises ValueError unless all workers of a tier run its decoder in the same format, in each revision."""
        first: dict[tuple[str, str], DecodeConfig] = {}
        for name in self.pools:
            config = self.worker_config(name)
            if not isinstance(config, DecodeConfig):
                continue
            other = first.setdefault((config.revision, config.tier), config)
            ours, theirs = other.decoder_settings, config.decoder_settings
            for key in sorted(ours.keys() | theirs.keys()):
                if ours.get(key) != theirs.get(key):
                    values = [one.get(key, "(default)") for one in (ours, theirs)]
                    variables = [worker.variable(key) for worker in (other, config)]
                    raise ValueError(
                        f"tier {config.tier or DEFAULT_TIER}: {other.section} workers have {key} {values[0]}, and "
                        f"{name} workers have {values[1]}; routers refuse workers of one tier that differ: set both "
                        f"{variables[0]} and {variables[1]}, or {key} in the settings of all"
                    )

    def check_apart(self, *, metrics: bool) -> None:
        """Raises ValueError if two servers have the same port, or one has a port that does not exist.

        Args:
            metrics: the ports of metrics count too, because all processes run on one machine.
        """
        claims: list[tuple[str, Sequence[int | str]]] = [
            ("--grpc (router.ports)", self.router.ports), ("--http (router.http_ports)", self.router.http_ports)
        ]  # fmt: skip
        if metrics:
            claims += [
                (f"--metrics-port (metrics_port of {pool})", ports) for pool, ports in self.metrics_ports.items()
            ]
        servers: dict[int | str, str] = {0: "", "off": ""}
        for server, port in ((server, port) for server, ports in claims for port in ports):
            if isinstance(port, int) and port > 65535:
                raise ValueError(f"{server}: a process would have port {port}, above 65535: give a smaller first port")
            if other := servers.get(port):
                same = "; on Ray, every process of a pool has the same metrics_port: give 0 or off"
                raise ValueError(
                    f"port {port} is given to two servers, {other} and {server}: give one of them another port"
                    + (same if self.runner == "ray" and "metrics" in server else "")
                )
            if port not in servers:
                servers[port] = server

    @classmethod
    def read(cls, data: Any) -> Self:
        """Returns the stack of plain data. Raises BadSettings naming each fault."""
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise BadSettings("; ".join(dict.fromkeys(_faults(error)))) from error

    @classmethod
    def load(cls, path: Path) -> Self:
        """Reads a document from a file, YAML or JSON. Raises BadSettings."""
        try:
            text = path.read_text(encoding="utf-8")
            data = (
                _parse_json(text) if path.suffix == ".json" else yaml.load(text, Loader=_DocumentLoader)
            )  # as safe as SafeLoader: creates no objects
            return cls.read({} if data is None else data)
        except OSError as error:
            raise BadSettings(f"{path}: cannot be read: {error.strerror}") from error
        except RecursionError as error:
            raise BadSettings(f"{path}: is nested too deeply for a stack") from error
        except BadSettings as error:
            raise BadSettings(f"{path}: {error}") from error
        except (ValueError, yaml.YAMLError) as error:
            raise BadSettings(f"{path}: {' '.join(str(error).split())}") from error

    def on(self, runner: Literal["ray", "processes"]) -> Self:
        """Returns the stack for ``runner``; for plain processes, without the fields that they do not use."""
        data = self.document()
        if runner == "processes":
            parts = [data, data.get("canary", {})]
            pools = [part.get(name, {}) for part in parts for name in (ROUTER, COLOCATED, PREFILL, DECODE)]
            for fields in (data, *pools, *(tier for part in parts for tier in part.get("tiers", {}).values())):
                for name in fields.keys() & (_ONLY_ON_RAY if fields is data else _RESERVED):
                    del fields[name]
        return self.read({**data, "runner": runner})

    def document(self) -> dict[str, Any]:
        """Returns plain data, from which ``read`` makes an equal stack; omits defaults."""
        unnamed = {"tiers": {"__all__": {"name"}}}
        return self.model_dump(mode="json", exclude_defaults=True, exclude={**unnamed, "canary": unnamed})

    def __str__(self) -> str:
        """The document as YAML."""
        return yaml.safe_dump(self.document(), sort_keys=False, allow_unicode=True, width=110)

    @property
    def pools(self) -> dict[str, PoolSpec]:
        """The pools of workers by name, the old revision's first, without those of no worker."""
        return {name: pool.spec for name, pool in self._worker_pools.items()}

    @property
    def _worker_pools(self) -> dict[str, _WorkerPool]:
        made = {}
        for part in self._parts:
            place = "" if part is self else "canary."
            given: dict[str, PoolSpec | None] = {PREFILL: part.prefill, DECODE: part.decode}
            if part is self:
                given = {COLOCATED: self.colocated, **given}
            tiers = {COLOCATED: self._default_tier(part), PREFILL: None, DECODE: ""}
            for kind, pool in given.items():
                if pool is not None:
                    made[pool_name(kind, "", part.revision)] = _WorkerPool(pool, f"{place}{kind}", part, tiers[kind])
            for tier, pool in part.tiers.items():
                if pool.replicas:
                    name = pool_name(DECODE, tier, part.revision)
                    made[name] = _WorkerPool(pool, f"{place}tiers.{tier}", part, tier)
        return made

    @property
    def _parts(self) -> list[StackSpec | CanarySpec]:
        """What describes each revision, the old one first."""
        return [self] if self.canary is None else [self, self.canary]

    def _place(self, pool: str) -> str:
        """Returns where a pool is in the document."""
        return pool if pool == ROUTER else self._worker_pools[pool].place

    @property
    def mock(self) -> bool:
        """True if the workers compute nothing."""
        return all(self.worker_config(name).engine == "mock" for name in self.pools)

    @property
    def joins_cluster(self) -> bool:
        """True if the stack runs on a Ray cluster that it joins, of which other machines may be part."""
        return self.runner == "ray" and self.ray_address is not None

    @property
    def deployments(self) -> dict[str, PoolSpec]:
        """All pools by name, the routers first."""
        return {ROUTER: self.router, **self.pools}

    def tier_of(self, pool: str) -> str | None:
        """Returns the tier in which a pool decodes, empty with one pair; None for prefill workers."""
        return self._worker_pools[pool].tier

    def revision_of(self, pool: str) -> str:
        """Returns the revision of a pool's pair; empty without a name."""
        return self._worker_pools[pool].part.revision

    def members(self, stage: WorkerStage) -> int:
        """Returns the initial number of workers of the old revision that have the stage."""
        pools = self._worker_pools.items()
        return sum(pool.spec.replicas for name, pool in pools if pool.part is self and stage in kind_of(name).stages)

    def _told_tiers(self, part: StackSpec | CanarySpec) -> tuple[TierSpec, ...]:
        """Returns the tiers of a revision as routers read them.

        The old revision's are empty with one pair, unless its decoder is loaded in another format.
        """
        tiers = []
        for name, tier in (part.tiers or {"": TierSpec(name=DEFAULT_TIER, pair=part.pair)}).items():
            pools = self._worker_pools.items()
            decoding = {key: pool.spec for key, pool in pools if pool.part is part and pool.tier == name}
            # Shared settings count too; routers refuse workers that have others than the tier.
            config = self.worker_config(next(iter(decoding)))
            format = config.decoder_settings if isinstance(config, DecodeConfig) else {}
            if name or "quantize" in format or part is not self:
                replicas = sum(pool.replicas for pool in decoding.values())
                own = tier.model_dump(exclude={*PoolSpec.model_fields})
                tiers.append(TierSpec(**own, replicas=replicas, settings=format))
        return tuple(tiers)

    @property
    def default_tier(self) -> str:
        """Name of the default tier; empty with one pair."""
        return self._default_tier(self)

    def _default_tier(self, part: StackSpec | CanarySpec) -> str:
        if not part.tiers:
            return ""
        settings = self.settings | self.router.settings
        name = default_tier([*part.tiers], str(settings.get("default_tier", "")))
        # The router's settings report a default tier that does not exist.
        return name if name in part.tiers else next(iter(part.tiers))

    @property
    def default_pair(self) -> str:
        """The default tier's pair, of which prefill workers and routers use the full model and the tokenizer."""
        return self._pair_of(self, None)

    def _pair_of(self, part: StackSpec | CanarySpec, tier: str | None) -> str:
        """Returns the pair of a revision's tier; None means the default tier."""
        return part.tiers[self._default_tier(part) if tier is None else tier].pair if part.tiers else part.pair

    @property
    def pairs(self) -> set[str]:
        """The pairs of all tiers of all revisions."""
        return {pair for pairs in self.pairs_by_revision.values() for pair in pairs.values()}

    @property
    def pairs_by_revision(self) -> dict[str, dict[str, str]]:
        """Revision -> tier -> pair, the old revision first. With one pair, the tier is called "default"."""
        return {
            part.revision: {name: tier.pair for name, tier in part.tiers.items()} or {DEFAULT_TIER: part.pair}
            for part in self._parts
        }

    def with_pairs(self, resolve: Callable[[str], str]) -> Self:
        """Returns the stack with each pair replaced by ``resolve(pair)``."""
        update = _resolved(self, resolve)
        if self.canary is not None:
            update["canary"] = self.canary.model_copy(update=_resolved(self.canary, resolve))
        return self.model_copy(update=update)

    def with_pool_settings(self, name: str, settings: Mapping[str, Any]) -> Self:
        """Returns the stack with further settings of the pool ``name``."""
        pool = self._worker_pools[name]
        changed = pool.spec.model_copy(update={"settings": {**pool.spec.settings, **settings}})
        field, _, tier = pool.place.removeprefix("canary.").partition(".")
        update = {field: {**pool.part.tiers, tier: changed} if tier else changed}
        if pool.part is self:
            return self.model_copy(update=update)
        return self.model_copy(update={"canary": pool.part.model_copy(update=update)})

    def with_secret(self, folder: Path) -> Self:
        """Returns the stack with the path of its secret in the shared ``folder``, if the runner makes the secret."""
        if not self.new_secret:
            return self
        settings = {**self.settings, "stack_secret": str(folder / "secret")}
        return self.model_copy(update={"new_secret": False, "settings": settings})

    @property
    def scales(self) -> bool:
        """True if the size of a pool may change."""
        return any(pool.max_replicas is not None for pool in self.pools.values())

    @property
    def grace_period(self) -> float:
        """Seconds that running requests have when a process drains: the maximum over the pools."""
        return max(self.router_config().grace_period, *(self.worker_config(name).grace_period for name in self.pools))

    @property
    def model(self) -> str:
        """Model name that clients request."""
        names = self.router_config().served_model_name
        return names[0] if names else Path(self.default_pair).name

    @property
    def metrics_ports(self) -> dict[str, list[int | str]]:
        """Metrics ports of the processes of each pool: 0 means any free one.

        On Ray, the processes of a pool have the same. Plain processes have consecutive ones: those of pools without a
        number of their own follow the routers'.
        """

        step = 1 if self.runner == "processes" else 0
        shared: Iterator[int | str] | None = None
        found = {}
        for name, pool in self.deployments.items():
            first = (self.router_config() if name == ROUTER else self.worker_config(name)).metrics_port
            ports: Iterator[int | str] = itertools.repeat(first)
            if isinstance(first, int) and first:
                ports = itertools.count(first, step)
            if "metrics_port" not in pool.settings:
                ports = shared = shared or ports
            found[name] = list(itertools.islice(ports, pool.replicas))
        return found

    def openai_urls(self, addresses: Sequence[str]) -> tuple[str, ...]:
        """Returns the base URLs of the OpenAI endpoints of the routers at these gRPC addresses, on any machine."""
        scheme = "http" if self.router_config().tls_cert is None else "https"
        ports = dict(zip(self.router.ports, self.router.http_ports, strict=False))
        places = map(split_address, addresses)
        return tuple(f"{scheme}://{host}:{ports[port]}/v1" for host, port in places if port in ports)

    def router_config(self, index: int = 0, node_ip: str = ANYWHERE.node_ip) -> RouterConfig:
        """Returns the settings of the router on ``ports[index]``. Raises ValueError naming a wrong setting.

        Args:
            node_ip: address of the router's machine.
        """
        own = self._metrics_host(self.router, node_ip) | {
            "port": self.router.ports[index],
            "expect_prefill": self.members("prefill"),
            "expect_decode": self.members("decode"),
            "pair": self.default_pair,
            "tiers": self._told_tiers(self) or None,
            "revision": self.revision,
        }
        if self.canary is not None:
            own |= {"canary_revision": self.canary.revision, "canary_percent": self.canary.percent}
            own |= {"canary_tiers": self._told_tiers(self.canary)}
        if self.router.http_ports:
            own["http"] = self.router.http_ports[index]
        return self._configure(ROUTER, RouterConfig, own)

    def worker_config(self, name: str, worker: WorkerPlace = ANYWHERE) -> WorkerSettings:
        """Returns the settings of a worker of the pool ``name``. Raises ValueError naming a wrong setting."""
        found, kind = self._worker_pools[name], kind_of(name)
        pool, part = found.spec, found.part
        own = self._placed(pool, worker) | {"pair": self._pair_of(part, found.tier), "revision": part.revision}
        if 0 < pool.num_gpus < 1 and "gpu_share" not in self.settings | pool.settings:
            own["gpu_share"] = pool.num_gpus
        if found.tier:
            tier = part.tiers[found.tier]
            objectives = {"ttft_objective": tier.ttft_objective, "itl_objective": tier.itl_objective}
            own |= {"tier": found.tier}
            own |= {key: value for key, value in objectives.items() if key in kind.settings.model_fields}
        return self._configure(name, kind.settings, own)

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

    def _configure(self, name: str, kind: type[_Config], own: dict[str, object]) -> _Config:
        pool = self.deployments[name]
        _check_names(self._place(name), pool.settings, kind)
        shared = {name: value for name, value in self.settings.items() if name in kind.model_fields}
        if self.new_secret:  # a placeholder: the runner makes the file
            shared["stack_secret"] = "-"
        if self.tls is not None:
            files = role_files(Path(self.tls), Role.ROUTER if name == ROUTER else Role.WORKER)
            shared |= {"tls_cert": files.cert, "tls_key": files.key, "tls_ca": files.ca}
            shared.setdefault("tls_name", NAME)
        return kind.of({**shared, **pool.settings, **{name: value for name, value in own.items() if value is not None}})


@dataclass(frozen=True, slots=True)
class _WorkerPool:
    """A pool of workers within a stack.

    Attributes:
        spec: its processes.
        place: where it is in the document.
        part: the part of the document that describes its revision.
        tier: tier in which it decodes, empty with one pair; None for prefill workers.
    """

    spec: PoolSpec
    place: str
    part: StackSpec | CanarySpec
    tier: str | None


def _resolved(part: StackSpec | CanarySpec, resolve: Callable[[str], str]) -> dict[str, Any]:
    """Returns the fields of a revision with its pairs, each replaced by ``resolve(pair)``."""
    if not part.tiers:
        return {"pair": resolve(part.pair)}
    return {"tiers": {name: tier.model_copy(update={"pair": resolve(tier.pair)}) for name, tier in part.tiers.items()}}


def _with_named_tiers(data: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields of a revision with the name of each tier, which is its key. Raises ValueError for another."""
    tiers = data.get("tiers") or {}
    if not isinstance(tiers, Mapping):
        return {**data}
    for name, one in tiers.items():
        if isinstance(one, Mapping) and one.get("name", name) != name:
            raise ValueError(f"tiers.{name}.name: got {one['name']!r}; the key is the tier's name: remove it")
    named = {name: {**one, "name": name} if isinstance(one, Mapping) else one for name, one in tiers.items()}
    return {**data, "tiers": named}


def _check_names(place: str, settings: Mapping[str, Any], kind: type[ServiceConfig]) -> None:
    known = kind.model_fields.keys() - {"config"}
    if unknown := sorted(settings.keys() - known):
        otherwise = f"{kind.program} --help lists all settings"
        hints = (f"{place}.settings.{name}: no such setting; {nearest(name, known, otherwise)}" for name in unknown)
        raise ValueError("; ".join(hints))


class _DocumentLoader(StrictConstructor, yaml.SafeLoader):
    """Loads plain data."""


def _parse_json(text: str) -> Any:
    """Parses JSON. Raises ValueError, also for duplicate keys."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found:
                raise ValueError(f"the key {key} appears twice")
            found[key] = value
        return found

    return json.loads(text, object_pairs_hook=unique)


def _faults(error: ValidationError) -> Iterator[str]:
    for item in error.errors():
        place = ".".join(map(str, item["loc"]))
        text = item["msg"].removeprefix("Value error, ")
        if item["type"] == "extra_forbidden":
            *where, name = item["loc"]
            text = f"no such field; {_nearest_field(where, str(name))}"
        elif item["type"] == "model_type" and not place:
            text = "expected the fields of a stack, such as `runner: processes`"
        yield f"{place}: {text}" if place else text


def _nearest_field(where: list[int | str], name: str) -> str:
    """Returns what a field that does not exist may mean. ``where`` leads to the object that has it."""
    kinds: dict[object, type[BaseModel]] = {"router": RouterSpec, "tiers": TierSpec}
    whole: type[BaseModel] = StackSpec
    if where[:1] == ["canary"]:
        where, whole = where[1:], CanarySpec
    known = (kinds.get(where[0], PoolSpec) if where else whole).model_fields.keys() - {"name" if where else ""}
    return nearest(name, known, f"the fields are {', '.join(sorted(known))}")

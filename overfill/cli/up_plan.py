"""Plans ``overfill up``: makes the settings of each process from flags, variables and the settings file.

Starts no processes.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import click

from overfill.cli.ports import free_ports
from overfill.cli.stack_plan import PlannedWorker, StackPlan
from overfill.cli.up_tiers import tier_objectives, with_colocated, worker_settings
from overfill.routing.tier import DEFAULT_TIER
from overfill.rpc.access import Role
from overfill.rpc.addresses import is_loopback, reachable
from overfill.rpc.certificates import NAME, RoleFiles, role_files
from overfill.rpc.tls import ClientTls
from overfill.settings.config import DecodeConfig, RouterConfig, ServiceConfig
from overfill.settings.config_file import BadConfigFile, field_name, flag_name
from overfill.settings.reader import BadSettings
from overfill.settings.tiers import TierSpec, default_tier
from overfill.settings.worker_kinds import COLOCATED, DECODE, PREFILL, WorkerKind, WorkerStage

GRPC_PORT, HTTP_PORT = 7600, 8000  # defaults
_Config = TypeVar("_Config", bound=ServiceConfig)


@dataclass(frozen=True)
class StackRequest:
    """What a user wants of a stack.

    Attributes:
        pair: folder of the stack's pair; None with ``tiers``.
        prefill, decode, routers: number of processes of each kind; ``tiers`` replaces ``decode``.
        colocated: number of workers with both stages. They decode in the default tier.
        port: gRPC port of the first router; 0 picks free ones. Further routers use the next ports, or share it.
        threads: CPU threads per worker; None divides the cores.
        settings: fields of the settings classes. Each process gets the fields that it has; None leaves a field to its
            environment variable or default. ``prefill_engine`` and ``decode_engine`` are the ``engine`` of one stage.
        http: port of the first OpenAI endpoint; 0 picks free ones, "off" disables the endpoint.
        tls: folder with a certificate per role; replaces the TLS fields of ``settings``.
        apart: workers may run on several machines.
        share_port: folder through which the routers share one gRPC port and one OpenAI endpoint; None gives each router
            its own.
        tiers: the tiers, each with its own pair, workers and settings; empty with one pair.
    """

    pair: Path | None
    prefill: int = 1
    decode: int = 1
    routers: int = 1
    port: int = 0
    threads: int | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    http: int | Literal["off"] = "off"
    tls: Path | None = None
    apart: bool = False
    share_port: Path | None = None
    tiers: tuple[TierSpec, ...] = ()
    colocated: int = 0

    @property
    def named_tiers(self) -> tuple[tuple[str, TierSpec], ...]:
        """Each tier with its name in ``DecodeConfig.tier``, which is empty with one pair."""
        if self.tiers:
            return tuple((tier.name, tier) for tier in self.tiers)
        assert self.pair is not None, "a stack needs a pair or tiers"
        return (("", TierSpec(DEFAULT_TIER, str(self.pair.resolve()), self.decode)),)

    @property
    def default_tier(self) -> tuple[str, TierSpec]:
        """The default tier, with its name in ``DecodeConfig.tier``."""
        tiers = self.named_tiers
        name = default_tier([tier.name for _, tier in tiers], self.settings.get("default_tier") or "")
        # The router reports a default tier that does not exist.
        return next((named for named in tiers if named[1].name == name), tiers[0])

    @property
    def expected_tiers(self) -> tuple[TierSpec, ...]:
        """The tiers as routers know them: with the number of workers that decode, those with both stages included."""
        _, default = self.default_tier
        return with_colocated([tier for _, tier in self.named_tiers], default.name, self.colocated)


@dataclass(frozen=True)
class _Pool:
    """Workers to plan, of one kind and tier.

    Attributes:
        name: their ids without the number.
        settings: what they have beside the settings of all workers.
    """

    kind: WorkerKind
    name: str
    count: int
    settings: dict[str, Any]


def make_plan(request: StackRequest) -> StackPlan:
    """Returns the settings of all processes.

    Raises:
        click.UsageError: a value is wrong, two servers would use the same port, certificates are given twice, a tier
            has a wrong setting or workers with different formats, or the host is open to other machines without
            certificates or API keys.
        CertificatesError: the folder lacks a certificate.
    """
    settings = dict(request.settings) | {"pair": request.default_tier[1].pair}
    of_router, of_worker = (_certificates(request.tls, settings, role) for role in (Role.ROUTER, Role.WORKER))
    _check_host(settings.get("host") or "127.0.0.1", settings | of_router)
    first_metrics = settings.pop("metrics_port", None)
    pools = _pools(request, settings)
    metrics = _metrics_ports(first_metrics, request.routers + sum(pool.count for pool in pools))
    routers = _routers(request, pools, settings | of_router, first_metrics, metrics)
    of_stack = _of_every_worker(request, routers)
    workers = [
        PlannedWorker(
            pool.kind,
            _configure(
                pool.kind.settings,
                settings
                | of_worker
                | of_stack
                | pool.settings
                | {"worker_id": f"{pool.name}-{index}", "metrics_port": next(metrics)},
                {"threads": _threads(request, pools, pool.kind)},
            ),
        )
        for pool in pools
        for index in range(pool.count)
    ]
    operator = None if request.tls is None else _client_tls(role_files(request.tls.absolute(), Role.OPERATOR))
    return _with_formats(StackPlan(routers, tuple(workers), operator), request)


def _pools(request: StackRequest, settings: Mapping[str, Any]) -> list[_Pool]:
    """Returns the pools, each with the engine and the settings that its stage or tier chooses for itself."""
    colocated, prefill, decode = COLOCATED, PREFILL, DECODE
    tiers = request.named_tiers
    of_tiers = [worker_settings(tier, decode.settings) for _, tier in tiers]
    of_prefill, *engines = _engines(
        settings.get("prefill_engine"), *(own.get("engine", settings.get("decode_engine")) for own in of_tiers)
    )
    name, default = request.default_tier
    of_colocated: dict[str, Any] = worker_settings(default, colocated.settings) | tier_objectives(default)
    if settings.get("engine") != "mock" and (request.prefill or any(tier.count for _, tier in tiers)):
        of_colocated["engine_args"] = None  # they are for the other workers
    return [
        _Pool(
            colocated,
            colocated.name,
            request.colocated,
            of_colocated | {"pair": default.pair, "tier": name or None},
        ),
        _Pool(prefill, prefill.name, request.prefill, of_prefill),
        *(
            _Pool(
                decode,
                f"{decode.name}-{name}" if name else decode.name,
                tier.count,
                engine | own | {"pair": tier.pair, "tier": name or None},
            )
            for (name, tier), engine, own in zip(tiers, engines, of_tiers, strict=True)
        ),
    ]


def _members(pools: Sequence[_Pool], stage: WorkerStage) -> int:
    """The number of workers that have the stage."""
    return sum(pool.count for pool in pools if stage in pool.kind.stages)


def _threads(request: StackRequest, pools: Sequence[_Pool], kind: WorkerKind) -> int:
    """The CPU threads of a worker of this kind, unless they are set.

    All cores are divided within each stage, because the stages are rarely busy at the same time, and waiting engine
    threads sleep. If workers may run on several machines, the cores are divided among all workers.
    """
    sharing = [sum(pool.count for pool in pools)] if request.apart else [_members(pools, one) for one in kind.stages]
    return threads_per_worker(max(sharing))


def threads_per_worker(workers: int) -> int:
    """Returns an equal share of this machine's cores for each of ``workers``, which run at the same time."""
    return max(1, len(os.sched_getaffinity(0)) // workers)


def _of_every_worker(request: StackRequest, routers: tuple[RouterConfig, ...]) -> dict[str, Any]:
    """Returns the settings that every worker of the stack has: the routers that it joins, and its own place."""
    host = routers[0].host
    return {
        "routers": ",".join(StackPlan(routers, ()).join_addresses),
        "threads": request.threads,
        "advertise": None if reachable(host) == host else reachable(host),
    }


def _with_formats(plan: StackPlan, request: StackRequest) -> StackPlan:
    """Returns the plan with routers that know the formats in which each tier's workers run its decoder.

    Workers may have these settings from the file or a variable, and routers refuse workers that differ from the tier.
    Raises click.UsageError if the workers of a tier differ from each other.
    """
    for tier in request.expected_tiers:
        _check_formats(tier.name, plan.of_tier(tier.name))
    formats = {tier.name: plan.of_tier(tier.name)[0].decoder_settings for tier in request.expected_tiers}
    if not request.tiers and all("quantize" not in format for format in formats.values()):
        return plan
    told = tuple(replace(tier, settings={**tier.settings, **formats[tier.name]}) for tier in request.expected_tiers)
    routers = tuple(router.model_copy(update={"decoders": told}) for router in plan.routers)
    return replace(plan, routers=routers)


def _check_formats(tier: str, workers: Sequence[DecodeConfig]) -> None:
    """Raises click.UsageError unless all workers of a tier run its decoder in the same format."""
    first = workers[0]
    for other in workers[1:]:
        ours, theirs = first.decoder_settings, other.decoder_settings
        for name in sorted(ours.keys() | theirs.keys()):
            if ours.get(name) != theirs.get(name):
                values = [one.get(name, "(default)") for one in (ours, theirs)]
                variables = [worker.variable(field_name(name)) for worker in (first, other)]
                raise click.UsageError(
                    f"tier {tier}: {first.worker_id} has {name} {values[0]}, and {other.worker_id} has {values[1]}; "
                    f"routers refuse workers of one tier that differ: set both {variables[0]} and {variables[1]}, or "
                    f"{name} under common in the file of --config"
                )


def _routers(
    request: StackRequest,
    pools: Sequence[_Pool],
    settings: dict[str, Any],
    first_metrics: str | None,
    metrics: Iterator[str | None],
) -> tuple[RouterConfig, ...]:
    """Returns the settings of the routers, with a port each or a shared one. Raises click.UsageError."""
    shared = 1 if request.share_port is None else request.routers  # routers per port
    places = request.routers // shared
    # In one call, so that all are different.
    free = free_ports(settings.get("host") or "127.0.0.1", 2 * places + request.routers)
    ports = range(request.port, request.port + places) if request.port else free[:places]
    https: Sequence[int | Literal["off"]] = ["off"] * places
    if request.http != "off":
        https = range(request.http, request.http + places) if request.http else free[places : 2 * places]
    joins = [0] * request.routers if request.share_port is None else free[2 * places :]
    processes = request.routers + sum(pool.count for pool in pools)
    _check_apart(
        ("--grpc", request.port, places),
        ("--http", request.http, places),
        ("--metrics-port", first_metrics, processes),
    )
    tiers = request.expected_tiers if request.tiers else ()
    configs = tuple(
        _configure(
            RouterConfig,
            settings
            | {"expect_prefill": _members(pools, "prefill"), "expect_decode": _members(pools, "decode")}
            | {
                "decoders": _tiers_text(tiers),
                "share_port": request.share_port,
            }
            | {"port": p, "http": h, "metrics_port": next(metrics), "join_port": join},
        )
        for p, h, join in zip([*ports] * shared, [*https] * shared, joins, strict=True)
    )
    if configs[0].share_port != request.share_port:
        raise click.UsageError(
            f"share-port {configs[0].share_port}: `overfill up` makes the folder itself, where routers share a port: "
            "remove the setting from the file or the variable"
        )
    return configs


def _tiers_text(tiers: Sequence[TierSpec]) -> str | None:
    """Returns the tiers as a router's --decoders; None without tiers. Raises click.UsageError."""
    for tier in tiers:
        if "," in tier.pair or ";" in str(tier):
            raise click.UsageError(
                f"--decoder {tier.name}: the folder must have neither comma nor semicolon in its path, and settings no "
                f"semicolon, because routers get all tiers as one text: {tier}"
            )
    return ";".join(map(str, tiers)) or None


def _engines(*stages: str | None) -> list[dict[str, Any]]:
    """Returns the settings of each stage, and of each tier, that its own choice of an engine replaces.

    A stage for which OverFill's engine was chosen so gets no arguments of vLLM, unless that leaves no stage for them:
    then the arguments are refused later.
    """
    without = {"engine_args": None} if set(stages) != {"overfill"} else {}
    return [{"engine": name} | (without if name == "overfill" else {}) if name else {} for name in stages]


def _check_host(host: str, settings: dict[str, Any]) -> None:
    """Raises click.UsageError naming everything that an open host needs; services would name one thing at a time."""
    given = _origins(RouterConfig, _flags(RouterConfig, settings))
    needs = []
    if not {"tls_cert", "tls_key", "tls_ca"} <= given.keys():
        needs.append("--tls FOLDER (`overfill certs FOLDER` makes it)")
    if "api_keys" not in given:
        needs.append("--api-keys FILE (`overfill keys create NAME --file FILE` makes it)")
    if needs and not is_loopback(host):
        raise click.UsageError(f"--host {host} is open to other machines: give {' and '.join(needs)}, or remove --host")


def _certificates(folder: Path | None, settings: dict[str, Any], role: Role) -> dict[str, Any]:
    if folder is None:
        return {}
    if any(settings.get(name) is not None for name in ("tls_cert", "tls_key", "tls_ca")):
        raise click.UsageError("--tls replaces --tls-cert, --tls-key and --tls-ca: remove them")
    files = role_files(folder.absolute(), role)
    name = settings.get("tls_name") or NAME
    return {"tls_cert": files.cert, "tls_key": files.key, "tls_ca": files.ca, "tls_name": name}


def _client_tls(files: RoleFiles) -> ClientTls:
    return ClientTls(files.ca, files.cert, files.key, NAME)


def _check_apart(*ranges: tuple[str, object, int]) -> None:
    """Raises click.UsageError if two flags claim the same port.

    Args:
        ranges: (flag, first port, number of ports); a first port that is 0 or not a number claims none.
    """
    claimed = [
        (flag, int(str(first)), count) for flag, first, count in ranges if str(first).isdecimal() and int(str(first))
    ]
    for (flag, first, count), (other, others_first, others_count) in itertools.combinations(claimed, 2):
        if first < others_first + others_count and others_first < first + count:
            raise click.UsageError(
                f"port ranges overlap: {_claim(flag, first, count)} and {_claim(other, others_first, others_count)}, "
                f"one port per process; give {other} {first + count} or higher, or {other} off"
            )


def _claim(flag: str, port: int, count: int) -> str:
    by_default = (flag, port) in (("--grpc", GRPC_PORT), ("--http", HTTP_PORT))
    used = f"{port} to {port + count - 1}" if count > 1 else f"{port}"
    return f"{flag} {port}{' (its default)' if by_default else ''} uses {used}"


def _metrics_ports(first: str | None, count: int) -> Iterator[str | None]:
    """Yields each process's metrics port: ``first`` and the next ones, or always ``first`` if it is 0 or not a port."""
    if first is None or not first.isdecimal() or int(first) == 0:
        return iter([first] * count)
    return iter([str(int(first) + index) for index in range(count)])


def _configure(kind: type[_Config], settings: dict[str, Any], otherwise: dict[str, Any] | None = None) -> _Config:
    """Parses settings. ``otherwise`` has values for fields that no setting, variable or key of the file sets.

    Raises:
        click.UsageError: a value is wrong.
    """
    argv = _flags(kind, settings)
    origins = _origins(kind, argv)
    rest = {name: value for name, value in (otherwise or {}).items() if name not in origins}
    try:
        return kind.read(argv + _flags(kind, rest))
    except BadSettings as error:
        raise click.UsageError(str(error)) from error


def _origins(kind: type[ServiceConfig], argv: list[str]) -> dict[str, str]:
    try:
        return kind.origins(argv)
    except BadConfigFile:
        return {}  # ``read`` reports it


def _flags(kind: type[ServiceConfig], settings: dict[str, Any]) -> list[str]:
    return [
        f"--{flag_name(name)}={value}"
        for name, value in settings.items()
        if value is not None and name in kind.model_fields
    ]

"""Describes a stack: makes the document from numbers of workers and from settings of flags, variables and a file.

Starts no processes.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from overfill.pair.store import MOCK
from overfill.process.gpus import gpu_count
from overfill.rpc.access import NAME, Role
from overfill.rpc.addresses import is_loopback
from overfill.rpc.certificates import role_files
from overfill.settings.config import SERVICES, RouterConfig, ServiceConfig, read_checked
from overfill.settings.config_file import all_names, flag_name, nearest
from overfill.settings.reader import BadSettings, Given
from overfill.settings.tiers import TEXT_FIELDS, TierSpec, default_tier
from overfill.settings.worker_kinds import KINDS
from overfill.stack.ray import placement
from overfill.stack.spec import (
    APPLICATION,
    COLOCATED,
    DECODE,
    DEFAULT_PAIR,
    PREFILL,
    SET_BY_STACK,
    RouterSpec,
    StackSpec,
    kind_of,
    pool_name,
)

GRPC_PORT, HTTP_PORT = 7600, 8000  # defaults

_OWN = SET_BY_STACK - {"share_port", "join_port"}
"""Settings that the document says elsewhere, or that no process of a stack has."""

_READ_BY_UP = {("router", "port"), ("router", "http"), ("router", "tiers")}
"""Section and name of those that are also options of ``up``."""

_TLS = {"tls_cert", "tls_key", "tls_ca", "tls_name"}

_OF_TIER = {
    "config", "pair", "revision", "tier", "worker_id", "routers", "port", "advertise", "metrics_port", "probe_port",
    "probe_host",
}  # fmt: skip
"""Settings of decode workers that differ between the workers of a tier, or that the tier itself sets."""


@dataclass(frozen=True, slots=True)
class RayPlacement:
    """Where a stack on Ray runs, and what its workers reserve.

    Attributes:
        ray_address: cluster to join, as for ``ray.init``; None starts one on this machine.
        name: name of the application.
        worker_cpus, worker_gpus: what Ray reserves per worker; None means an equal share of this machine.
        max_prefill, max_decode: maximum number of workers of an autoscaled pool; None means a fixed number.
    """

    ray_address: str | None = None
    name: str = APPLICATION
    worker_cpus: float | None = None
    worker_gpus: float | None = None
    max_prefill: int | None = None
    max_decode: int | None = None


def describe(
    pair: Path | str = "",
    *,
    prefill: int = 1,
    decode: int = 1,
    colocated: int = 0,
    tiers: Sequence[TierSpec] = (),
    routers: int = 1,
    port: int = 0,
    http: int | Literal["off"] = "off",
    share_port: bool = False,
    threads: int | None = None,
    settings: Mapping[str, Any] | None = None,
    tls: Path | None = None,
    ray: RayPlacement | None = None,
    log_dir: Path | None = None,
    revision: str = "",
) -> StackSpec:
    """Returns the document of a stack.

    Args:
        pair: the stack's pair, or its folder, unless there are ``tiers``. Empty means the engine's: ``mock`` for the
            mock engine, and ``default`` for others.
        prefill, decode, routers: number of processes of each kind; ``tiers`` replaces ``decode``.
        colocated: number of workers with both stages. They decode in the default tier.
        tiers: the tiers, each with its own pair, workers and settings; empty with one pair.
        port, http: ports of the first router; 0 picks free ones. Further routers use the next ports, or share them.
        share_port: the routers share ``port`` and ``http``.
        threads: CPU threads per worker; None divides the cores.
        settings: fields of the settings classes. Each pool gets the fields that it has; None leaves a field to its
            environment variable or default. ``prefill_engine`` and ``decode_engine`` are the ``engine`` of one stage,
            and so with ``tensor_parallel_size``.
        tls: folder with a certificate per role; replaces the TLS fields of ``settings``.
        ray: place of a stack on Ray; None means plain processes.
        log_dir: folder for one log file per process.
        revision: name of this state of the pairs' weights; empty means none.

    Raises:
        BadSettings: a value is wrong, two servers would use the same port, certificates are given twice, a tier has a
            wrong setting or workers with different formats, or the host is open to
            other machines without certificates or API keys.
        CertificatesError: the folder lacks a certificate.
    """
    pair = str(pair.resolve()) if isinstance(pair, Path) else pair
    flags = {name: value for name, value in (settings or {}).items() if value is not None}
    if threads is not None:
        flags["threads"] = threads
    if tls is not None and _TLS - {"tls_name"} & flags.keys():
        raise BadSettings("--tls replaces --tls-cert, --tls-key and --tls-ca: remove them")
    counts = {COLOCATED: colocated, PREFILL: prefill} | (
        {pool_name(DECODE, tier.name): tier.replicas for tier in tiers} if tiers else {DECODE: decode}
    )
    counts = {name: count for name, count in counts.items() if count}
    router = _given(RouterConfig, flags, tls, Role.ROUTER)
    _check_host(router)
    places = 1 if share_port else routers
    default = default_tier([tier.name for tier in tiers], _text(router, "default_tier")) if tiers else ""
    own = _own_settings(flags, counts, tiers, default)
    given = {name: _given(kind_of(name).settings, flags | own[name], tls, Role.WORKER) for name in counts}
    pair = pair or (MOCK if all(_text(one, "engine") == "mock" for one in given.values()) else DEFAULT_PAIR)
    default_pair = next((tier.pair for tier in tiers if tier.name == default), pair)
    read: dict[str, dict[str, Any]] = {}
    secret = "api_keys" in router and not {"stack_secret", "tls_ca"} & router.keys()
    extra = {"stack_secret": Given("-", "")} if secret else {}
    told = {"tiers": Given(tuple(tiers), "--tier")} if tiers else {}
    pair_of_router = {"pair": Given(default_pair, "--pair")}
    read["router"] = _settings(RouterConfig.made(router | extra | told | pair_of_router), tls, secret)
    ranks = {name: count * _ranks(given[name]) for name, count in counts.items()}
    for name in counts:
        threads_made = {"threads": Given(_threads(name, ranks, ray), "--threads")}
        kind = kind_of(name).settings
        read[name] = _settings(kind.made(threads_made | given[name] | pair_of_router | extra), tls, secret)

    resources = _resources(counts, read, tiers, routers, ray)
    shared = _shared(read, {name: kind_of(name).settings for name in counts} | {"router": RouterConfig})
    for each in read.values():
        for key in shared:
            each.pop(key, None)

    def pool(name: str) -> dict[str, Any]:
        return {"replicas": counts[name], **resources[name], "settings": read[name]}

    ports = range(port, port + places) if port else [0] * places
    data: dict[str, Any] = {
        "runner": "processes" if ray is None else "ray",
        "router": {
            "replicas": routers,
            "ports": [*ports],
            "http_ports": [] if http == "off" else [*(range(http, http + places) if http else [0] * places)],
            "settings": read["router"],
        },
        "settings": shared,
        "tls": None if tls is None else str(tls.absolute()),
        "new_secret": secret,
        "log_dir": None if log_dir is None else str(log_dir.absolute()),
        "revision": revision,
    }
    if ray is not None:
        data |= {"name": ray.name, "ray_address": ray.ray_address}
    if tiers:
        data["tiers"] = {
            tier.name: {
                **tier.model_dump(include={"pair", "fallback", "ttft_objective", "itl_objective"}),
                **(pool(pool_name(DECODE, tier.name)) if tier.replicas else {"replicas": 0}),
            }
            for tier in tiers
        }
    else:
        data["pair"] = pair
    data |= {name: pool(name) for name in (COLOCATED, PREFILL, DECODE) if name in counts}
    return StackSpec.read(data)


def _given(kind: type[ServiceConfig], flags: Mapping[str, Any], tls: Path | None, role: Role) -> dict[str, Given]:
    """Returns the settings of a service that flags, variables, the file and the folder of certificates give."""
    given = kind.given(
        {name: value for name, value in flags.items() if name in kind.model_fields and value is not None}
    )
    if tls is not None:
        files = role_files(tls.absolute(), role)
        given |= {"tls_cert": Given(files.cert, "--tls"), "tls_key": Given(files.key, "--tls")}
        given |= {"tls_ca": Given(files.ca, "--tls"), "tls_name": given.get("tls_name", Given(NAME, "--tls"))}
    return given


def _settings(config: ServiceConfig, tls: Path | None, secret: bool) -> dict[str, Any]:
    """Returns the settings of a pool that the document does not say elsewhere."""
    if isinstance(config, RouterConfig) and config.share_port is not None:
        raise BadSettings(
            f"share-port {config.share_port}: `overfill up` makes the folder itself, where routers share a port: "
            "remove the setting from the file or the variable"
        )
    elsewhere = _OWN | (_TLS - {"tls_name"} if tls else set()) | ({"stack_secret"} if secret else set())
    return {name: value for name, value in config.settings().items() if name not in elsewhere}


def _shared(read: Mapping[str, dict[str, Any]], kinds: Mapping[str, type[ServiceConfig]]) -> dict[str, Any]:
    """Returns the settings that all processes which have them share."""
    shared = {}
    for key in dict.fromkeys(key for settings in read.values() for key in settings):
        having = [settings.get(key) for name, settings in read.items() if key in kinds[name].model_fields]
        if having[0] is not None and all(value == having[0] for value in having):
            shared[key] = having[0]
    return shared


def _own_settings(
    flags: Mapping[str, Any],
    counts: Mapping[str, int],
    tiers: Sequence[TierSpec],
    default: str,
) -> dict[str, dict[str, Any]]:
    """Returns the settings of each pool that its stage or tier chooses for itself; None takes a flag away."""
    decode = KINDS[DECODE].settings
    pools = {pool_name(DECODE, tier.name): tier_settings(tier, decode) for tier in tiers} if tiers else {DECODE: {}}
    of_prefill, *engines = _engines(
        flags.get("prefill_engine"), *(own.get("engine", flags.get("decode_engine")) for own in pools.values())
    )
    size_of_prefill, size_of_decode = (
        {"tensor_parallel_size": size} if (size := flags.get(f"{stage}_tensor_parallel_size")) is not None else {}
        for stage in ("prefill", "decode")
    )
    found = {PREFILL: of_prefill | size_of_prefill} | {
        name: engine | size_of_decode | own for (name, own), engine in zip(pools.items(), engines, strict=True)
    }
    if COLOCATED in counts:
        own = next((tier_settings(tier, KINDS[COLOCATED].settings) for tier in tiers if tier.name == default), {})
        # The arguments and ranks of vLLM are for the other workers.
        of_vllm = {"engine_args": None, "tensor_parallel_size": None}
        found[COLOCATED] = own | (of_vllm if len(counts) > 1 and flags.get("engine") != "mock" else {})
    return found


def _engines(*stages: str | None) -> list[dict[str, Any]]:
    """Returns the settings of each stage, and of each tier, that its own choice of an engine replaces.

    A stage for which OverFill's engine was chosen so gets no arguments of vLLM, unless that leaves no stage for them:
    then the arguments are refused later.
    """
    without = {"engine_args": None} if set(stages) != {"overfill"} else {}
    return [{"engine": name} | (without if name == "overfill" else {}) if name else {} for name in stages]


def tier_settings(tier: TierSpec, kind: type[ServiceConfig]) -> dict[str, Any]:
    """Returns the settings of a tier's decode workers. Raises BadSettings if they have no such setting."""
    fields = [name for name in kind.model_fields if name not in _OF_TIER]
    for name in tier.settings:
        if name not in fields:
            known = (*TEXT_FIELDS, *map(flag_name, fields))
            hint = nearest(flag_name(name), known, all_names(kind.section))
            raise BadSettings(f"--tier {tier.name}: {flag_name(name)}: a tier has no such setting; {hint}")
    return dict(tier.settings)


def _ranks(given: Mapping[str, Given]) -> int:
    """Returns the number of ranks of a pool's workers; 1 for a wrong number, which is refused later."""
    text = _text(given, "tensor_parallel_size")
    return max(1, int(text)) if text.isdecimal() else 1


def _threads(name: str, ranks: Mapping[str, int], ray: RayPlacement | None) -> int:
    """Returns the CPU threads of each rank of a pool's workers, unless they are set. ``ranks``: those of each pool.

    All cores are divided within each stage, because the stages are rarely busy at the same time, and waiting engine
    threads sleep. If workers may run on several machines, the cores are divided among all ranks.
    """
    if ray is not None and ray.ray_address is not None:
        return threads_per_worker(sum(ranks.values()))
    stages = kind_of(name).stages
    return threads_per_worker(
        max(sum(count for other, count in ranks.items() if stage in kind_of(other).stages) for stage in stages)
    )


def threads_per_worker(workers: int) -> int:
    """Returns an equal share of this machine's cores for each of ``workers``, which run at the same time."""
    return max(1, len(os.sched_getaffinity(0)) // workers)


def _resources(
    counts: Mapping[str, int],
    read: Mapping[str, Mapping[str, Any]],
    tiers: Sequence[TierSpec],
    routers: int,
    ray: RayPlacement | None,
) -> dict[str, dict[str, Any]]:
    """Returns the bounds of each pool, and what Ray reserves for each of its workers."""
    own = {pool_name(DECODE, tier.name): tier.max_replicas for tier in tiers}
    if ray is None:
        return {name: {"max_replicas": own.get(name)} for name in counts}
    most = {
        name: None if name == COLOCATED else ray.max_prefill if name == PREFILL else own.get(name) or ray.max_decode
        for name in counts
    }
    for name, maximum in most.items():
        if maximum is not None and maximum < counts[name]:
            raise BadSettings(
                f"--max-{name} {maximum} is less than --{name} {counts[name]}: give at least {counts[name]}"
            )
    wanted = {name: most[name] or count for name, count in counts.items()}
    on_gpu = {name: read[name].get("device", "auto") != "cpu" for name in counts}
    ranks: dict[str, int] = {name: read[name].get("tensor_parallel_size", 1) for name in counts}
    cpus, gpus = ray.worker_cpus, ray.worker_gpus
    if ray.ray_address is None:
        free = len(os.sched_getaffinity(0)) - RouterSpec().num_cpus * routers
        cpus = placement.share(free, sum(wanted.values())) if cpus is None else cpus
        gpus = (
            _gpu_share({name: (wanted[name], ranks[name]) for name in counts if on_gpu[name]}) if gpus is None else gpus
        )

    def reserved_gpus(name: str) -> float:
        return 0.0 if not (gpus and on_gpu[name]) else float(ranks[name]) if ranks[name] > 1 else gpus

    return {
        name: {
            "max_replicas": most[name],
            "num_cpus": float(read[name].get("threads", 1) * ranks[name]) if cpus is None else cpus,
            "num_gpus": reserved_gpus(name),
        }
        for name in counts
    }


def _gpu_share(pools: Mapping[str, tuple[int, int]]) -> float:
    """Returns what Ray reserves of this machine's GPUs for each worker of one rank; 0 without GPUs.

    Args:
        pools: numbers of workers, and of ranks of each, by pool. Workers with several ranks take whole GPUs.

    Raises:
        BadSettings: they leave no GPU to the workers of one rank, which would compute on the CPU.
    """
    gpus = gpu_count()
    taken = sum(count * ranks for count, ranks in pools.values() if ranks > 1)
    sharing = {name: count for name, (count, ranks) in pools.items() if ranks == 1}
    if gpus and sharing and taken >= gpus:
        names = ", ".join(f"{count} of {name}" for name, count in sharing.items())
        raise BadSettings(
            f"--tensor-parallel-size: on Ray, each rank has a GPU of its own: the ranks take {taken} of this machine's "
            f"{gpus}, and none is left for the other workers ({names}); give --no-ray, with which workers share GPUs, "
            "or a smaller size"
        )
    return placement.gpu_share(gpus - taken, sum(sharing.values())) if sharing else float(gpus > 0)


def check_used(spec: StackSpec, config: Path | None) -> None:
    """Raises BadSettings for a variable or a key of the file that has no effect on the stack.

    That is one of workers that the stack does not have, or one that ``up`` sets itself for each process.
    """
    file = None if config is None else read_checked(config)
    for service in SERVICES:
        own = [name for name in service.model_fields if name in _OWN and (service.section, name) not in _READ_BY_UP]
        made = [service.variable(name) for name in own if os.environ.get(service.variable(name))]
        if file is not None:
            keys = file.sections.get(service.section, {})
            made += [f"{file.path}: {service.section}.{key}" for key in map(flag_name, own) if key in keys]
        if made:
            raise BadSettings(
                f"{', '.join(made)}: `overfill up` sets this for each process itself, so the setting has no effect: "
                "remove it"
            )
    present = {kind_of(name).name for name in spec.pools}
    for name, kind in KINDS.items():
        if name in present:
            continue
        unused = sorted(variable for variable in kind.settings.variables() if os.environ.get(variable))
        if file is not None:
            unused += [f"{file.path}: {name}.{key}" for key in file.sections.get(name, {})]
        if unused:
            raise BadSettings(
                f"{', '.join(unused)}: this stack has no {name} workers, so the setting has no effect: remove it, "
                f"or add --{name} 1"
            )


def _text(given: Mapping[str, Given], name: str) -> str:
    return str(given[name].value) if name in given else ""


def _check_host(router: Mapping[str, Given]) -> None:
    """Raises BadSettings naming everything that an open host needs; services would name one thing at a time."""
    host = _text(router, "host") or "127.0.0.1"
    needs = []
    if not {"tls_cert", "tls_key", "tls_ca"} <= router.keys():
        needs.append("--tls FOLDER (`overfill certs FOLDER` makes it)")
    if "api_keys" not in router:
        needs.append("--api-keys FILE (`overfill keys create NAME --file FILE` makes it)")
    if needs and not is_loopback(host):
        raise BadSettings(f"--host {host} is open to other machines: give {' and '.join(needs)}, or remove --host")

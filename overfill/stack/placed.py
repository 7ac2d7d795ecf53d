"""The processes of a stack on this machine, each with its ports and complete settings. Starts nothing."""

from __future__ import annotations

import secrets
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from overfill.process.held_folder import PREFIX
from overfill.routing.tier import DEFAULT_TIER
from overfill.rpc.access import NAME, Role
from overfill.rpc.addresses import reachable
from overfill.rpc.certificates import role_files
from overfill.rpc.tls import ClientTls, Credentials
from overfill.settings.config import ColocatedConfig, DecodeConfig, PrefillConfig, RouterConfig
from overfill.settings.tiers import TierSpec
from overfill.settings.worker_kinds import WorkerKind, WorkerSettings, WorkerStage
from overfill.stack.ports import fill_ports, free_ports
from overfill.stack.spec import ROUTER, StackSpec, WorkerPlace, kind_of


@dataclass(frozen=True, slots=True)
class PlacedWorker:
    """A worker with its complete settings."""

    pool: str
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


@dataclass(frozen=True)
class PlacedStack:
    """The processes of a stack. Routers have fixed ports, which they may share.

    Attributes:
        spec: the document, with the routers' ports.
        folder: folder of files that the processes share, which the runner makes.
        routers: settings of each router.
        workers: the workers, pool by pool.
        operator_tls: TLS files with which an operator calls the routers; None means the routers' own.
        api_key: API key with which measurements send requests; None if the routers need none.
    """

    spec: StackSpec
    folder: Path
    routers: tuple[RouterConfig, ...]
    workers: tuple[PlacedWorker, ...]
    operator_tls: ClientTls | None = None
    api_key: str | None = field(default=None, repr=False)

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

    def of_stage(self, stage: WorkerStage) -> tuple[PlacedWorker, ...]:
        """Returns the workers that have the stage."""
        return tuple(worker for worker in self.workers if stage in worker.kind.stages)

    def worker(self, id: str) -> PlacedWorker:
        """Returns the worker with this id."""
        return next(worker for worker in self.workers if worker.id == id)

    def with_configs(self, change: Callable[[PlacedWorker], WorkerSettings]) -> PlacedStack:
        """Returns the stack with the settings of each worker replaced by ``change(worker)``."""
        return replace(self, workers=tuple(replace(worker, config=change(worker)) for worker in self.workers))

    @property
    def tiers(self) -> tuple[TierSpec, ...]:
        """The tiers, the default one first. With one pair there is one, called "default"."""
        return self.routers[0].ordered_tiers

    @property
    def addresses(self) -> tuple[str, ...]:
        """gRPC addresses at which clients on this machine reach the routers: one if the routers share it."""
        return tuple(dict.fromkeys(f"{reachable(router.host)}:{router.port}" for router in self.routers))

    @property
    def join_addresses(self) -> tuple[str, ...]:
        """Address of each router process alone, at which workers join it."""
        return tuple(f"{reachable(router.host)}:{router.join_port or router.port}" for router in self.routers)

    @property
    def client_tls(self) -> ClientTls | None:
        """TLS files with which an operator calls the routers; None means no TLS."""
        return self.operator_tls or self.routers[0].client_tls()

    @property
    def credentials(self) -> Credentials:
        """What an operator shows the routers."""
        return Credentials(self.client_tls, self.secret or "")

    @property
    def secret(self) -> str | None:
        """The stack's secret, with which an operator calls the routers; None without one."""
        return secret_of(self.routers[0])


def shared_folder() -> Path:
    """Returns a folder, which does not exist yet, for the files that the processes of a stack share on one machine."""
    return Path(tempfile.gettempdir()) / f"{PREFIX}{secrets.token_hex(8)}"


def place(spec: StackSpec) -> PlacedStack:
    """Returns the processes of ``spec``, with ports that are free now where it names none."""
    folder = shared_folder()
    document = fill_ports(spec)
    spec = document.with_secret(folder)
    metrics = {name: iter(ports) for name, ports in spec.metrics_ports.items()}
    routers = tuple(
        config.model_copy(update={"metrics_port": next(metrics[ROUTER])}) for config in _routers(spec, folder)
    )
    workers: list[PlacedWorker] = []
    addresses = PlacedStack(document, folder, routers, ()).join_addresses
    for name, pool in spec.pools.items():
        for index in range(pool.replicas):
            place = WorkerPlace(f"{name}-{index}", ",".join(addresses), reachable(routers[0].host))
            config = spec.worker_config(name, place).model_copy(update={"metrics_port": next(metrics[name])})
            workers.append(PlacedWorker(name, kind_of(name), config))
    return PlacedStack(document, folder, routers, tuple(workers), operator_tls(spec))


def operator_tls(spec: StackSpec) -> ClientTls | None:
    """Returns the TLS files with which an operator calls the routers; None means the routers' own."""
    if spec.tls is None:
        return None
    files = role_files(Path(spec.tls), Role.OPERATOR)
    return ClientTls(files.ca, files.cert, files.key, NAME)


def secret_of(router: RouterConfig) -> str | None:
    """Returns the secret that a stack's processes send each other; None without one."""
    shown = router.credentials()
    return None if shown is None else shown.secret or None


def _routers(spec: StackSpec, folder: Path) -> Iterator[RouterConfig]:
    count = spec.router.replicas
    if len(spec.router.ports) >= count:
        yield from map(spec.router_config, range(count))
        return
    config = spec.router_config()
    for port in free_ports(config.host, count):
        yield config.model_copy(update={"share_port": folder / "routers", "join_port": port})

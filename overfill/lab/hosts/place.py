"""Places a planned stack on hosts: an address for each process, certificates for mutual TLS, and API keys."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from overfill.api.key_file import create
from overfill.lab.hosts.network import Host, make_hosts
from overfill.rpc import certificates
from overfill.rpc.access import NAME, Role
from overfill.rpc.tls import ClientTls
from overfill.settings.config import ServiceConfig
from overfill.stack.placed import PlacedStack

_PORT = 7600  # of every process; each has a host of its own

_Config = TypeVar("_Config", bound=ServiceConfig)


@contextmanager
def place_on_hosts(plan: PlacedStack) -> Iterator[tuple[PlacedStack, dict[str, Host]]]:
    """Makes a host for every process of ``plan``, and removes the hosts at the end. Starts no process.

    Yields the plan with the hosts' addresses, certificates and an API key, and name of a process -> its host.

    Raises:
        CannotMakeHosts: This machine cannot make hosts.
    """
    names = [*(f"router-{index}" for index in range(len(plan.routers))), *(worker.id for worker in plan.workers)]
    with (
        make_hosts(names) as hosts,
        tempfile.TemporaryDirectory(prefix="overfill-hosts-") as folder,
    ):
        certificates.make(Path(folder))
        key_file = Path(folder) / "api-keys.json"
        api_key = create(key_file, "lab")
        addresses = {name: host.address for name, host in hosts.items()}
        yield replace(place(plan, addresses, Path(folder), key_file), api_key=api_key), hosts


def place(plan: PlacedStack, addresses: Mapping[str, str], folder: Path, key_file: Path) -> PlacedStack:
    """Returns ``plan`` with each process at the address of its host.

    Args:
        addresses: Name of a process -> address of its host.
        folder: Certificates, as ``certificates.make`` writes them.
        key_file: File of API keys. Routers that listen beyond loopback require one.
    """
    routers = tuple(f"{addresses[f'router-{index}']}:{_PORT}" for index in range(len(plan.routers)))

    def moved(config: _Config, name: str, role: Role, **more: object) -> _Config:
        files = certificates.role_files(folder, role)
        tls = {"tls_cert": files.cert, "tls_key": files.key, "tls_ca": files.ca, "tls_name": NAME}
        return config.model_copy(update={"host": addresses[name], "port": _PORT, **tls, **more})

    operator = certificates.role_files(folder, Role.OPERATOR)
    return replace(
        plan.with_configs(lambda worker: moved(worker.config, worker.id, Role.WORKER, routers=routers)),
        routers=tuple(
            moved(router, f"router-{index}", Role.ROUTER, api_keys=key_file)
            for index, router in enumerate(plan.routers)
        ),
        operator_tls=ClientTls(operator.ca, operator.cert, operator.key, NAME),
    )

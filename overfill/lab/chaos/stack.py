"""A stack whose processes have probes, settable clocks, and connections that can fail.

The connections are those of loopback through ``add_proxies``, or of real links through ``add_hosts``.
"""

from __future__ import annotations

import itertools
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Any

import psutil

from overfill.lab.chaos.clock import Clocks
from overfill.lab.chaos.control import ProbeControl
from overfill.lab.chaos.proxy import TcpProxy
from overfill.lab.hosts.network import Host
from overfill.lab.hosts.place import place_on_hosts
from overfill.settings.config import ServiceConfig
from overfill.stack.child import Child
from overfill.stack.placed import PlacedStack
from overfill.stack.ports import free_ports
from overfill.stack.process_runner import ProcessRunner

_PROBES = "overfill.lab.chaos.probes"


Link = TcpProxy | Host
"""Both have the attributes ``delay``, ``loss`` and ``rate``, and the methods ``partition`` and ``heal``.

A proxy is a link of the processes at both of its ends, so that faults may partition it twice.
"""


@dataclass(frozen=True, slots=True)
class Links:
    """What is between the processes.

    Attributes:
        routers: Addresses at which clients reach the routers.
        by_process: Process -> links through which it communicates.
        hosts: Process -> its host. Empty when all processes run on this machine's own network.
    """

    routers: tuple[str, ...]
    by_process: dict[str, list[Link]] = field(default_factory=dict)
    hosts: dict[str, Host] = field(default_factory=dict)


class BreakableStack(ProcessRunner):
    """Runs ``plan`` with probes that connect to ``control``. It can restart routers too."""

    def __init__(self, plan: PlacedStack, links: Links, control: ProbeControl, clocks: Clocks) -> None:
        prefixes = {name: host.enter for name, host in links.hosts.items()}
        super().__init__(plan, lambda name, line: None, prefixes=prefixes)
        self.links = links
        self.control = control
        self.clocks = clocks

    @property
    def routers(self) -> list[str]:
        """The routers' names, in the order of the plan's addresses."""
        return [f"router-{index}" for index in range(len(self.placed.routers))]

    def names(self, stage: str) -> list[str]:
        """Returns the names of a stage's processes."""
        if stage == "router":
            return self.routers
        return [worker.id for worker in self.placed.workers if stage in worker.kind.stages]

    def like(self, stage: str, name: str) -> set[str]:
        """Returns the names of a stage's processes that can replace ``name``: those of its revision, and itself."""
        if stage == "router":
            return set(self.routers)
        revision = self.placed.worker(name).config.revision
        return {one for one in self.names(stage) if self.placed.worker(one).config.revision == revision}

    def process(self, name: str) -> Child:
        """Returns the process that currently has the name."""
        return next(child for child in [*self._routers, *self._workers] if child.name == name)

    def processes(self) -> list[Child]:
        """Returns the processes that are running."""
        return [child for child in [*self._routers, *self._workers] if child.returncode is None]

    def restart(self, name: str) -> None:
        if name in self.routers:
            index = self.routers.index(name)
            config = self.placed.routers[index]
            self._routers[index] = self._spawn(name, "services.router.main", config, threads=1)
        else:
            super().restart(name)

    def _program(self, name: str, module: str) -> list[str]:
        return [_PROBES, self.control.path, name, module]

    def _environment(self, name: str, config: ServiceConfig, threads: int) -> dict[str, str]:
        return super()._environment(name, config, threads) | self.clocks.environment(name)


def ranks_of(worker: int) -> list[psutil.Process]:
    """Returns the processes of the ranks of the worker with this process id, in their order."""
    names = ("spawn_main", "VLLM::Worker")  # a rank has the second name once it has loaded
    children = psutil.Process(worker).children()
    ranks = [child for child in children if any(name in " ".join(child.cmdline()) for name in names)]
    return sorted(ranks, key=lambda child: child.pid)


async def add_proxies(plan: PlacedStack, exits: AsyncExitStack, seed: int) -> tuple[PlacedStack, Links]:
    """Puts a proxy in front of every port of ``plan`` that listens.

    * Clients reach each router through one proxy.
    * A worker has one proxy through which others reach it, and one towards each router.
    * A router's links are the proxies towards it; it reaches workers through the workers' links.
    """

    async def proxy(address: str) -> TcpProxy:
        return await exits.enter_async_context(TcpProxy(address, seed=next(seeds)))

    seeds = itertools.count(seed)
    inbound = [await proxy(address) for address in plan.addresses]
    links = Links(tuple(p.address for p in inbound), {f"router-{i}": [p] for i, p in enumerate(inbound)})
    updates: dict[str, dict[str, Any]] = {}
    for number, (worker, port) in enumerate(zip(plan.workers, free_ports("127.0.0.1", len(plan.workers)), strict=True)):
        own, *outbound = [await proxy(address) for address in (f"127.0.0.1:{port}", *plan.addresses)]
        links.by_process[worker.id] = [own, *outbound]
        for index, one in enumerate(outbound):
            links.by_process[f"router-{index}"].append(one)
        updates[worker.id] = {"port": port, "advertise": own.address, "routers": tuple(p.address for p in outbound)}
        if worker.kind.stages == ("decode",) and number % 2:
            updates[worker.id]["shm"] = False  # so that some KV travels by shared memory and some over the network
    return plan.with_configs(lambda worker: worker.config.model_copy(update=updates[worker.id])), links


async def add_hosts(plan: PlacedStack, exits: AsyncExitStack) -> tuple[PlacedStack, Links]:
    """Makes a host for each process of ``plan``. A process's link is that of its host. ``exits`` removes the hosts."""
    placed, hosts = exits.enter_context(place_on_hosts(plan))
    return placed, Links(placed.addresses, {name: [host] for name, host in hosts.items()}, hosts)

"""Cores of a router for tests, of what a test has."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

from jobs import worker_info

from overfill.api.attribution import drop_attribution
from overfill.routing.async_dispatcher import AsyncDispatcher
from overfill.routing.dispatcher import Dispatcher
from overfill.routing.pool import Roster
from overfill.routing.tier import Tier
from overfill.routing.worker import DECODE, PREFILL
from overfill.v1 import decode_pb2, registry_pb2
from services.router.core import Core
from services.router.revisions import Revisions
from services.router.served_tiers import ServedTiers


def one_revision(handler: Any) -> Revisions:
    """Returns the revisions of a router that serves one, whose requests ``handler`` handles."""
    core: Any = SimpleNamespace(revision="", handler=handler)
    return Revisions([core])


def revisions_of(*rosters: Roster, dispatcher: Any = None, names: tuple[str, ...] = ("", "r2")) -> Revisions:
    """Returns the revisions of a router with these workers, whose requests nobody handles."""
    cores: list[Any] = [
        SimpleNamespace(
            revision=name, roster=roster, async_dispatcher=dispatcher or AsyncDispatcher(Dispatcher(roster))
        )
        for name, roster in zip(names, rosters, strict=False)
    ]
    return Revisions(cores)


class FakeCore(Core):
    """The parts of a core that need no files. Each revision has one worker per stage and tier, which is ready."""

    def __init__(self, revision: str) -> None:
        tiers = [Tier("default"), Tier("fast")]
        config: Any = SimpleNamespace(vocab_size=100, max_positions=64)
        pairs: Any = {tier.name: SimpleNamespace(full_config=config, revision=revision) for tier in tiers}
        self.revision = revision
        self.roster = Roster(tiers=tiers)
        self.dispatcher: Any = SimpleNamespace(num_jobs=7, num_waiting=2)
        self.handler: Any = SimpleNamespace(
            tiers=ServedTiers(["tiny"], pairs, self.roster),
            revision=revision,
            shorten=lambda request: drop_attribution(request.chat),
        )
        self._expect_prefill, self._expect_decode, self._brownout = 1, {"default": 1, "fast": 1}, None
        identity = replace(worker_info("", PREFILL).identity, revision=revision)
        infos = (("p", PREFILL, ""), ("d", DECODE, "default"), ("f", DECODE, "fast"))
        self.workers = {
            name: self.roster.join(worker_info(f"{revision}-{name}", stage, tier=tier, identity=identity))
            for name, stage, tier in infos
        }
        for name in self.workers:
            self.set_ready(name, ready=True)

    def set_ready(self, *names: str, ready: bool, running: int = 0, waiting: int = 0) -> None:
        """Reports whether these workers are ready, and their load.

        "p" prefills, "d" and "f" decode in the tiers default and fast.
        """
        for name in names:
            worker = self.workers[name]
            load = decode_pb2.WorkerLoad(kv_blocks_total=100, block_size=16, running=running, waiting=waiting)
            report = registry_pb2.Report(load=load, credits=4, ready=ready)
            self.roster.pool_of(worker).report(worker, report, asyncio.get_running_loop().time())

"""Probes of a worker's ranks: a trial damages the KV that they send and receive, and holds a request before they pull.

A rank gets its probe with what it needs to connect to its worker: to unpickle it starts it.
"""

from __future__ import annotations

import multiprocessing
import os
from functools import cache
from typing import Any

from overfill.lab.chaos.patching import around, damage_received, damage_sent
from overfill.lab.chaos.probe import Probe


class RankProbe:
    """The probe of each rank of the worker ``name``, which connects to the socket at ``path``."""

    def __init__(self, path: str, name: str) -> None:
        self._arguments = path, name

    def __reduce__(self) -> tuple[Any, ...]:
        return start, self._arguments


@cache
def start(path: str, name: str) -> RankProbe:
    """Starts the probe, once, if this process is a rank."""
    if multiprocessing.parent_process() is not None:
        probe = Probe(path, f"{name}/{os.getpid()}")
        damage_sent(probe.flip)
        damage_received(probe.flip)
    return RankProbe(path, name)


def give_probes(path: str, name: str) -> None:
    """Gives a probe to each rank that this worker starts."""
    from overfill.engine.vllm.ranks.link import RankLinks

    @around(RankLinks, "__init__")
    def init_watched(init: Any, self: Any, *arguments: Any) -> None:
        init(self, *arguments)
        self.config = {**self.config, "probe": RankProbe(path, name)}


def watch_rank_pulls(probe: Probe) -> None:
    """Holds requests before their ranks pull."""
    from overfill.engine.vllm.ranks.worker import RankPuller
    from overfill.telemetry import logs

    @around(RankPuller, "pull")
    async def pull_held(pull: Any, self: Any, *arguments: Any) -> None:
        await probe.hold("handoff", logs.request_id.get(), quiet=True)
        await pull(self, *arguments)

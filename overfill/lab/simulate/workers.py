"""Modelled workers as the router sees them: they join, report and drain.

Their engines are modelled in ``prefill`` and ``decode``. A worker with both stages has both, and they take turns.

Reports are real wire messages, sent after changes and every second, as by ``rpc/membership.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol, TypeAlias

from overfill.engine.turns import Turns
from overfill.kv.handshake import KvIdentity
from overfill.kv.spec import KvSpec, RopeSpec
from overfill.lab.simulate.blocks import CachedBlocks, KeptBlocks, SharedBlocks
from overfill.lab.simulate.clock import Event
from overfill.lab.simulate.colocated import SimTurns
from overfill.lab.simulate.decode import DecodeListener, SimDecode
from overfill.lab.simulate.options import SimTier
from overfill.lab.simulate.prefill import PrefillListener, SimPrefill
from overfill.lab.simulate.profiles import Profile
from overfill.routing.worker import DECODE, PREFILL, Worker, WorkerInfo
from overfill.rpc.membership import REPORT_INTERVAL
from overfill.v1 import common_pb2, registry_pb2

REPORT_GAP = 0.05
"""Minimum seconds between two reports of a worker."""

_IDENTITY = KvIdentity(1, "simulated", "simulated", KvSpec(1, 1, 2, "bfloat16", RopeSpec()))


class SimRouter(PrefillListener, DecodeListener, Protocol):
    """The simulated stack as its workers see it. It adds the time that each message travels.

    Attributes:
        profile: Speed of workers without a tier.
        tiers: The tiers by name.
        block_tokens: Tokens of a block that prompts may share; 0 without such blocks.
        lends_kv: Whether workers lend each other KV.
    """

    profile: Profile
    tiers: dict[str, SimTier]
    block_tokens: int
    lends_kv: bool

    def reported(self, worker: SimWorker, reports: Sequence[registry_pb2.Report]) -> None:
        """Receives the reports of the worker's stages, in their order."""


Stages: TypeAlias = "tuple[common_pb2.Stage, ...]"

PREFILL_ONLY: Stages = (PREFILL,)
DECODE_ONLY: Stages = (DECODE,)
BOTH: Stages = (PREFILL, DECODE)


class SimWorker:
    """A modelled worker: its engines, lifecycle and reports.

    Args:
        stages: Its stages, prefill first.
        tier: Tier of its answers; empty if it writes none.

    Attributes:
        entries: The worker in each of its pools of the router's roster; empty before it joins and after it leaves.
        since, until: Times at which it was started, and at which it left or the run ended.
        prefill, decode: Models of the computation in its stages; None without the stage.
        disk: KV that its prefill stage has on disk; outlives the worker. None without a disk.
        returned: KV of prompts and answers that its decode stage lends; None if it does not.
    """

    def __init__(self, name: str, stages: Stages, tier: str, router: SimRouter, disk: KeptBlocks | None) -> None:
        clock, block_tokens = router.clock, router.block_tokens
        profile = router.tiers[tier].profile if tier else router.profile
        if stages == BOTH:
            profile = profile.colocated()
        self.name, self.stages, self.tier = name, stages, tier
        self._clock, self._router, self._profile = clock, router, profile
        self.entries: tuple[Worker, ...] = ()
        self.since = self.until = clock.now
        self.draining = False
        self.disk = disk
        self.prefill: SimPrefill | None = None
        self.decode: SimDecode | None = None
        self.returned: KeptBlocks | None = None
        self._turns: SimTurns | None = None
        self._report: Event | None = None  # the next one
        self._reported = float("-inf")
        if PREFILL in stages:
            blocks = CachedBlocks(profile.prefill.kv_tokens, block_tokens)
            self.prefill = SimPrefill(profile, blocks, router, disk)
            self.prefill.on_load = self._load_changed
        if DECODE in stages:
            self.decode = engine = SimDecode(profile, router)
            engine.on_load = self._load_changed
        if router.lends_kv and stages == DECODE_ONLY and profile.returns_kv:
            # As many as fit into what the answers leave free.
            size = profile.decode.block_size
            self.returned = KeptBlocks(lambda: (engine.total - engine.used) * size // block_tokens)
        if self.prefill is not None and self.decode is not None:
            goals = router.tiers[tier].goals
            turns = Turns(profile.prefill.max_num_batched_tokens, goals.ttft, goals.itl)
            self._turns = SimTurns(clock, self.prefill, self.decode, turns)

    @property
    def infos(self) -> list[WorkerInfo]:
        """The worker's description in each of its stages."""
        common = WorkerInfo(self.name, 1, PREFILL, "", (), _IDENTITY, 0, 0, colocated=self.stages == BOTH)
        prefill = replace(common, lends_kv=self._router.lends_kv)
        decode = replace(common, stage=DECODE, tier=self.tier, lends_kv=self.returned is not None)
        return [prefill if stage == PREFILL else decode for stage in self.stages]

    @property
    def pools(self) -> tuple[str, ...]:
        """The pools that it is in: "prefill", and the tier of its answers."""
        return tuple(self.tier if stage == DECODE else "prefill" for stage in self.stages)

    @property
    def lent(self) -> SharedBlocks | None:
        """The KV that the worker lends; None if it lends none."""
        return self.returned if self.prefill is None else self.prefill.blocks

    @property
    def active(self) -> int:
        """Number of requests on the worker; one that is in both stages counts twice."""
        answers = 0 if self.decode is None else len(self.decode.sequences)
        return answers + (0 if self.prefill is None else len(self.prefill.tickets))

    def check(self) -> None:
        """Raises AssertionError when a counter of an engine is inconsistent."""
        for part in (self.prefill, self.decode, self._turns):
            if part is not None:
                part.check()

    def push(self) -> None:
        """Reports now, and again in a second or after a change."""
        self._reported = self._clock.now
        self._schedule(self._clock.now + REPORT_INTERVAL)
        self._router.reported(self, self._reports())

    @property
    def seconds(self) -> float:
        """For how long it has been there, from its start on."""
        return self.until - self.since

    def leave(self) -> None:
        """Ends the reports, when the worker leaves the router's roster."""
        self.entries, self.until = (), self._clock.now
        if self._report is not None:
            self._report.cancel()

    def kill(self) -> None:
        for engine in (self.decode, self.prefill):
            if engine is not None:
                engine.kill()

    def _load_changed(self) -> None:
        """Schedules a report as soon as ``REPORT_GAP`` seconds have passed since the last one."""
        if self.entries:
            due = max(self._clock.now, self._reported + REPORT_GAP)
            if self._report is None or due < self._report.time:
                self._schedule(due)

    def _schedule(self, time: float) -> None:
        if self._report is not None:
            self._report.cancel()
        self._report = self._clock.at(time, self.push)

    def _reports(self) -> list[registry_pb2.Report]:
        """Returns the report of each stage, as the router divides a worker's report."""
        reports = []
        if self.prefill is not None:
            compute, sources = self._profile.prefill.seconds_per_token, self._profile.import_seconds
            costs = registry_pb2.KvCosts(
                compute_ns=round(compute * 1e9), **{f"{name}_ns": round(s * 1e9) for name, s in sources.items()}
            )
            disk = None if self.disk is None else self.disk.delta()
            blocks = self.prefill.blocks.delta()
            reports.append(registry_pb2.Report(load=self.prefill.load(), prefix=blocks, disk=disk, costs=costs))
        if self.decode is not None:
            blocks = None if self.returned is None else self.returned.delta()
            reports.append(registry_pb2.Report(load=self.decode.load(), prefix=blocks))
        model = self._profile.prefill if self.decode is None else self._profile.decode
        for report in reports:
            report.ready, report.draining, report.credits = True, self.draining, model.max_num_seqs
        return reports

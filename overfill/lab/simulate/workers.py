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
from overfill.lab.simulate.blocks import CachedBlocks, KeptBlocks
from overfill.lab.simulate.clock import Clock, Event
from overfill.lab.simulate.colocated import SimTurns
from overfill.lab.simulate.decode import DecodeListener, SimDecode
from overfill.lab.simulate.histogram import Histogram
from overfill.lab.simulate.options import SimTier
from overfill.lab.simulate.prefill import PrefillListener, SimPrefill
from overfill.lab.simulate.profiles import Profile
from overfill.routing.worker import DECODE, PREFILL, Worker, WorkerInfo
from overfill.rpc.membership import REPORT_INTERVAL
from overfill.v1 import common_pb2, decode_pb2, registry_pb2

REPORT_GAP = 0.05
"""Minimum seconds between two reports of a worker."""

_IDENTITY = KvIdentity(1, "simulated", "simulated", KvSpec(1, 1, 2, "bfloat16", RopeSpec()))


class SimRouter(PrefillListener, DecodeListener, Protocol):
    """Receiver of the workers' messages. It adds the time that each message travels."""

    def reported(self, worker: SimWorker, reports: Sequence[registry_pb2.Report]) -> None:
        """Receives the reports of the worker's stages, in their order."""


Stages: TypeAlias = "tuple[common_pb2.Stage, ...]"

PREFILL_ONLY: Stages = (PREFILL,)
DECODE_ONLY: Stages = (DECODE,)
BOTH: Stages = (PREFILL, DECODE)


class SimWorker:
    """A modelled worker: its engines, lifecycle and reports.

    Attributes:
        stages: Its stages, prefill first.
        entries: The worker in each of its pools of the router's roster; empty before it has joined.
        since: Time at which it was started.
        ready_since: Time at which it became ready; None while it starts.
        gone: True once it has left or died.
        prefill, decode: Models of the computation in its stages; None without the stage.
        disk: KV that its prefill stage has on disk; outlives the worker. None without.
        returned: KV of prompts and answers that its decode stage lends; None if it does not.
        tier: Tier of the answers that it writes; empty without decode.
    """

    def __init__(
        self,
        name: str,
        stages: Stages,
        clock: Clock,
        router: SimRouter,
        profile: Profile,
        tier: SimTier | None,
        gaps: Histogram,
        shared_block: int,
        *,
        lends: bool,
        disk: KeptBlocks | None = None,
    ) -> None:
        """Args:
        profile: Its speed if it has no tier.
        shared_block: As of ``CachedBlocks``.
        lends: Whether workers lend each other KV.
        """
        profile = profile if tier is None else tier.profile
        if stages == BOTH:
            profile = profile.colocated()
        self.name, self.stages, self.tier = name, stages, "" if tier is None else tier.name
        self._clock, self._router, self._profile, self._lends = clock, router, profile, lends
        self.entries: tuple[Worker, ...] = ()
        self.since = clock.now
        self.ready_since: float | None = None
        self.draining = self.gone = False
        self.disk = disk
        self.prefill: SimPrefill | None = None
        self.decode: SimDecode | None = None
        self.returned: KeptBlocks | None = None
        self._turns: SimTurns | None = None
        self._due: Event | None = None
        self._reported = float("-inf")
        if PREFILL in stages:
            blocks = CachedBlocks(profile.prefill.kv_tokens, shared_block)
            self.prefill = SimPrefill(clock, profile, blocks, router, self._load_changed, disk)
        if DECODE in stages:
            self.decode = engine = SimDecode(clock, profile, router, gaps, self._load_changed)
        if lends and stages == DECODE_ONLY and profile.returns_kv:
            # As many as fit into what the answers leave free.
            size = profile.decode.block_size
            self.returned = KeptBlocks(lambda: (engine.total - engine.used) * size // shared_block)
        if self.prefill is not None and self.decode is not None and tier is not None:
            turns = Turns(profile.prefill.max_num_batched_tokens, tier.goals.ttft, tier.goals.itl)
            self._turns = SimTurns(clock, self.prefill, self.decode, turns)

    @property
    def infos(self) -> list[WorkerInfo]:
        """The worker's description in each of its stages."""
        common = WorkerInfo(self.name, 1, PREFILL, "", (), _IDENTITY, 0, 0, colocated=self.stages == BOTH)
        prefill = replace(common, lends_kv=self._lends)
        decode = replace(common, stage=DECODE, tier=self.tier, lends_kv=self.returned is not None)
        return [prefill if stage == PREFILL else decode for stage in self.stages]

    @property
    def pools(self) -> tuple[str, ...]:
        """The pools that it is in: "prefill", and the tier of its answers."""
        return tuple(self.tier if stage == DECODE else "prefill" for stage in self.stages)

    @property
    def lent(self) -> SimPrefill | KeptBlocks | None:
        """The KV that the worker lends; None if it lends none."""
        return self.prefill if self.prefill is not None else self.returned

    @property
    def active(self) -> int:
        """Number of requests on the worker; one that is in both stages counts twice."""
        answers = 0 if self.decode is None else len(self.decode.sequences)
        return answers + (0 if self.prefill is None else self.prefill.active)

    def check(self) -> None:
        """Raises AssertionError when a counter of an engine is inconsistent."""
        for part in (self.prefill, self.decode, self._turns):
            if part is not None:
                part.check()

    def decode_load(self) -> decode_pb2.WorkerLoad:
        engine = self.decode
        assert engine is not None
        return decode_pb2.WorkerLoad(
            kv_blocks_used=engine.used,
            kv_blocks_total=engine.total,
            block_size=self._profile.decode.block_size,
            running=engine.batch,
            waiting=len(engine.sequences) - engine.batch,
        )

    def _reports(self) -> list[registry_pb2.Report]:
        """Returns the report of each stage, as the router divides a worker's report."""
        reports = []
        model = self._profile.prefill if self.decode is None else self._profile.decode
        for stage in self.stages:
            report = registry_pb2.Report(ready=True, draining=self.draining, credits=model.max_num_seqs)
            memory: CachedBlocks | KeptBlocks | None = self.returned
            if stage == DECODE:
                report.load.CopyFrom(self.decode_load())
            elif (engine := self.prefill) is not None:
                memory = engine.blocks
                report.load.kv_blocks_used = engine.blocks.used
                report.load.kv_blocks_cached = engine.blocks.cache.num_cached
                report.load.kv_blocks_total = engine.blocks.total
                report.load.block_size = engine.blocks.block_size
                report.load.running, report.load.waiting = engine.num_admitted, len(engine.waiting)
                report.load.queued_tokens = engine.queued_tokens
                if self.disk is not None and (delta := self.disk.delta()) is not None:
                    report.disk.CopyFrom(delta)
                per_token = self._profile.import_seconds
                report.costs.compute_ns = round(self._profile.prefill.seconds_per_token * 1e9)
                report.costs.peer_ns, report.costs.disk_ns = (round(per_token[s] * 1e9) for s in ("peer", "disk"))
            if memory is not None and (delta := memory.delta()) is not None:
                report.prefix.CopyFrom(delta)
            reports.append(report)
        return reports

    def _load_changed(self) -> None:
        """Schedules a report as soon as ``REPORT_GAP`` seconds have passed since the last one."""
        if not self.gone and self.entries:
            due = max(self._clock.now, self._reported + REPORT_GAP)
            if self._due is None or due < self._due.time:
                self._schedule(due)

    def push(self) -> None:
        """Reports now."""
        if not self.gone and self.entries:
            self._reported = self._clock.now
            self._schedule(self._clock.now + REPORT_INTERVAL)
            self._router.reported(self, self._reports())

    def leave(self) -> None:
        self.gone = True
        if self._due is not None:
            self._due.cancel()

    def kill(self) -> None:
        self.leave()
        for engine in (self.decode, self.prefill):
            if engine is not None:
                engine.kill()

    def _schedule(self, time: float) -> None:
        if self._due is not None:
            self._due.cancel()
        self._due = self._clock.at(time, self.push)

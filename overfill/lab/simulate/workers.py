"""Modelled workers as the router sees them: they join, report and drain.

Their engines are modelled in ``prefill`` and ``decode``.

Reports are real wire messages, sent after changes and every second, as by ``rpc/membership.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from overfill.kv.handshake import KvIdentity
from overfill.kv.spec import KvSpec, RopeSpec
from overfill.lab.simulate.blocks import Blocks
from overfill.lab.simulate.clock import Clock, Event
from overfill.lab.simulate.decode import SimDecode, SimSequence
from overfill.lab.simulate.histogram import Histogram
from overfill.lab.simulate.prefill import SimPrefill, Ticket
from overfill.lab.simulate.profiles import Profile
from overfill.routing.worker import DECODE, PREFILL, Worker, WorkerInfo
from overfill.v1 import common_pb2, decode_pb2, registry_pb2

REPORT_INTERVAL = 1.0
"""Seconds between reports while nothing changes."""

_IDENTITY = KvIdentity(1, "simulated", "simulated", KvSpec(1, 1, 2, "bfloat16", RopeSpec()))


class SimRouter(Protocol):
    """Receiver of the workers' messages. It adds the time that each message travels."""

    def reported(self, worker: SimWorker, report: registry_pb2.Report) -> None: ...

    def prompt_computed(self, worker: SimWorker, ticket: Ticket) -> None: ...

    def kv_sent(self, worker: SimWorker, ticket: Ticket) -> None: ...

    def answer_done(self, worker: SimWorker, sequence: SimSequence) -> None: ...

    def kv_needed(self, worker: SimWorker, sequence: SimSequence) -> None: ...

    def preempted(self, worker: SimWorker, sequence: SimSequence) -> None: ...


class SimWorker:
    """Base class of modelled workers: lifecycle and reports.

    Attributes:
        entry: The worker in the router's roster; None before it has joined.
        since: Time at which it was started.
        ready_since: Time at which it became ready; None while it starts.
        gone: True once it has left or died.
        engine: Model of its computation, created by the subclass.
        tier: Tier of a decode worker; empty for prefill.
    """

    engine: SimPrefill | SimDecode
    tier = ""

    def __init__(self, name: str, stage: common_pb2.Stage, clock: Clock, router: SimRouter, report_gap: float) -> None:
        self.name, self.stage = name, stage
        self.clock, self.router = clock, router
        self.entry: Worker | None = None
        self.since = clock.now
        self.ready_since: float | None = None
        self.draining = self.gone = False
        self._gap = report_gap
        self._due: Event | None = None
        self._due_at = 0.0
        self._reported = float("-inf")

    @property
    def info(self) -> WorkerInfo:
        return WorkerInfo(self.name, 1, self.stage, "", (), _IDENTITY, max_model_len=0, vocab_size=0, tier=self.tier)

    @property
    def active(self) -> int:
        """Number of requests on the worker."""
        return self.engine.active

    @property
    def busy(self) -> float:
        """Seconds spent in steps so far."""
        return self.engine.busy

    def load(self) -> decode_pb2.WorkerLoad:
        raise NotImplementedError

    def check(self) -> None:
        """Raises AssertionError when the engine's counters are inconsistent."""
        self.engine.check()

    def report(self) -> registry_pb2.Report:
        raise NotImplementedError

    def load_changed(self) -> None:
        """Schedules a report as soon as ``report_gap`` seconds have passed since the last one."""
        if not self.gone and self.entry is not None:
            due = max(self.clock.now, self._reported + self._gap)
            if self._due is None or due < self._due_at:
                self._schedule(due)

    def push(self) -> None:
        """Reports now."""
        if not self.gone and self.entry is not None:
            self._reported = self.clock.now
            self._schedule(self.clock.now + REPORT_INTERVAL)
            self.router.reported(self, self.report())

    def leave(self) -> None:
        self.gone = True
        if self._due is not None:
            self._due.cancel()

    def _schedule(self, time: float) -> None:
        if self._due is not None:
            self._due.cancel()
        self._due_at = time
        self._due = self.clock.at(time, self.push)


class PrefillWorker(SimWorker):
    engine: SimPrefill

    def __init__(
        self, name: str, clock: Clock, router: SimRouter, report_gap: float, profile: Profile, blocks: Blocks
    ) -> None:
        super().__init__(name, PREFILL, clock, router, report_gap)
        self.engine = SimPrefill(clock, profile, blocks, self)
        self._credits = profile.prefill.max_num_seqs

    def load(self) -> decode_pb2.WorkerLoad:
        engine, blocks = self.engine, self.engine.blocks
        return decode_pb2.WorkerLoad(
            kv_blocks_used=blocks.used,
            kv_blocks_cached=blocks.cached,
            kv_blocks_total=blocks.total,
            block_size=blocks.block_size,
            running=engine.num_admitted,
            waiting=engine.num_waiting,
            queued_tokens=engine.queued_tokens,
            prefix_tokens_looked_up=blocks.tokens_looked_up,
            prefix_tokens_found=blocks.tokens_found,
        )

    def report(self) -> registry_pb2.Report:
        delta = self.engine.blocks.delta()
        return registry_pb2.Report(
            load=self.load(), credits=self._credits, ready=True, draining=self.draining, prefix=delta
        )

    def kill(self) -> Sequence[Ticket]:
        self.leave()
        return self.engine.kill()

    def prompt_computed(self, ticket: Ticket) -> None:
        self.router.prompt_computed(self, ticket)

    def kv_sent(self, ticket: Ticket) -> None:
        self.router.kv_sent(self, ticket)


class DecodeWorker(SimWorker):
    engine: SimDecode

    def __init__(
        self,
        name: str,
        clock: Clock,
        router: SimRouter,
        report_gap: float,
        profile: Profile,
        gaps: Histogram,
        tier: str = "",
    ) -> None:
        super().__init__(name, DECODE, clock, router, report_gap)
        self.tier = tier
        self.engine = SimDecode(clock, profile, self, gaps)
        self._model = profile.decode

    def load(self) -> decode_pb2.WorkerLoad:
        engine = self.engine
        return decode_pb2.WorkerLoad(
            kv_blocks_used=engine.used,
            kv_blocks_total=engine.total,
            block_size=self._model.block_size,
            running=engine.num_running,
            waiting=engine.num_waiting,
        )

    def report(self) -> registry_pb2.Report:
        return registry_pb2.Report(
            load=self.load(), credits=self._model.max_num_seqs, ready=True, draining=self.draining
        )

    def kill(self) -> Sequence[SimSequence]:
        self.leave()
        return self.engine.kill()

    def answer_done(self, sequence: SimSequence) -> None:
        self.router.answer_done(self, sequence)

    def kv_needed(self, sequence: SimSequence) -> None:
        self.router.kv_needed(self, sequence)

    def preempted(self, sequence: SimSequence) -> None:
        self.router.preempted(self, sequence)

"""One request of a trace on its way through the simulated stack, and what became of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from overfill.lab.simulate.decode import SimSequence
from overfill.lab.simulate.prefill import Ticket
from overfill.lab.traffic.outcome import Objective
from overfill.lab.traffic.traces import TraceRequest
from overfill.routing.dispatcher import Job


@dataclass(eq=False, slots=True)
class DecodeAttempt:
    """The request on one decode worker. What comes in after it is ``over`` is stale."""

    request: SimRequest
    worker: str
    sequence: SimSequence
    ticket: Ticket | None = None
    prefill: str = ""
    over: bool = False

    @classmethod
    def start(cls, request: SimRequest, worker: str) -> DecodeAttempt:
        """One that goes on where the last one ended: emitted tokens are replayed."""
        trace, emitted = request.trace, request.emitted
        sequence = SimSequence(
            trace.prompt_tokens, trace.output_tokens, emitted, owner=None, replay=max(0, emitted - 1)
        )
        attempt = cls(request, worker, sequence)
        sequence.owner = attempt
        return attempt


def attempt_of(sequence: SimSequence) -> DecodeAttempt:
    assert isinstance(sequence.owner, DecodeAttempt)
    return sequence.owner


@dataclass(eq=False, slots=True)
class SimRequest:
    """Attributes:
    first, last: when the client had the first and the last token; None: not yet.
    emitted: tokens that the router knows of, for the next attempt.
    error: why it ended without its answer.
    cached: prompt tokens that the last prefill found in the cache.
    """

    trace: TraceRequest
    job: Job
    blocks: Sequence[int] = ()
    first: float | None = None
    last: float | None = None
    emitted: int = 0
    attempt: DecodeAttempt | None = None
    error: str = ""
    cached: int = 0
    migrations: int = 0
    ended: bool = False
    placed: float | None = None  # on a decode worker, for the first time

    @property
    def ok(self) -> bool:
        return self.ended and not self.error

    @property
    def ttft(self) -> float:
        """Seconds from arrival to the first token; infinite when none came."""
        return float("inf") if self.first is None else self.first - self.trace.arrival

    @property
    def itl(self) -> float:
        """Mean seconds between tokens; 0 for an answer of one."""
        if self.first is None or self.last is None or self.trace.output_tokens < 2:
            return 0.0
        return (self.last - self.first) / (self.trace.output_tokens - 1)

    @property
    def e2e(self) -> float:
        return float("inf") if self.last is None else self.last - self.trace.arrival

    def meets(self, objective: Objective) -> bool:
        """Whether it was answered within the objective."""
        pairs = ((objective.ttft, self.ttft), (objective.itl, self.itl), (objective.e2e, self.e2e))
        return self.ok and all(limit is None or value <= limit for limit, value in pairs)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The stack at one moment; shares are of the time since the sample before.

    Attributes:
        workers: of a pool that exist, those that start or drain included; ready: that take work.
        target: what the scaler wants; None without one.
        busy: share of the ready workers' time spent in steps.
        waiting, arrived: requests waiting in the router; that came since the sample before.
    """

    time: float
    prefill_workers: int
    decode_workers: int
    prefill_ready: int
    decode_ready: int
    prefill_target: int | None
    decode_target: int | None
    prefill_busy: float
    decode_busy: float
    waiting: int
    arrived: int
    prefill_need: float | None = None
    decode_need: float | None = None


@dataclass(slots=True)
class Counters:
    """What a run counted. Times in seconds of virtual time.

    CPU time are ``cpu_seconds``, and of those ``decision_seconds`` (in the dispatcher, reports apart) and
    ``report_seconds``.
    """

    events: int = 0
    decisions: int = 0
    checks: int = 0
    refusals: int = 0
    preemptions: int = 0
    failures: int = 0
    migrations: int = 0
    cpu_seconds: float = 0.0
    decision_seconds: float = 0.0
    reports: int = 0
    report_seconds: float = 0.0
    prefill_worker_seconds: float = 0.0
    decode_worker_seconds: float = 0.0
    prefill_busy: float = 0.0
    decode_busy: float = 0.0
    prompt_tokens: int = 0
    cached_tokens: int = 0

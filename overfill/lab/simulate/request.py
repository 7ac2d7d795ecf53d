"""State of a simulated request, snapshots of the stack, and counters of a run."""

from __future__ import annotations

from dataclasses import dataclass, field

from overfill.lab.simulate.decode import SimSequence
from overfill.lab.simulate.prefill import Ticket
from overfill.lab.traffic.outcome import Objective
from overfill.lab.traffic.traces import TraceRequest
from overfill.routing.job import Job
from overfill.routing.tier import DEFAULT_TIER


@dataclass(eq=False, slots=True)
class DecodeAttempt:
    """A request on one decode worker. Messages that arrive after ``over`` is set are stale."""

    request: SimRequest
    worker: str
    sequence: SimSequence
    ticket: Ticket | None = None
    prefill: str = ""
    with_start: str = ""  # prefill worker that was assigned with the start
    over: bool = False

    @classmethod
    def start(cls, request: SimRequest, worker: str) -> DecodeAttempt:
        """Starts an attempt that continues the last one: it replays the emitted tokens."""
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
    """A request of the trace in the simulated stack.

    Attributes:
        first, last: Times at which the client had the first and the last token. None means not yet.
        emitted: Tokens that the router has received; the next attempt continues after them.
        error: Reason why the request ended without an answer; empty if it did not.
        asked: Tier that it asks for. The job has the tier that answers.
        allows_brownout: True if a cheaper tier may answer.
    """

    trace: TraceRequest
    job: Job
    first: float | None = None
    last: float | None = None
    emitted: int = 0
    attempt: DecodeAttempt | None = None
    error: str = ""
    ended: bool = False
    asked: str = DEFAULT_TIER
    allows_brownout: bool = False

    @property
    def ok(self) -> bool:
        return self.ended and not self.error

    @property
    def ttft(self) -> float:
        """Seconds from arrival to the first token; infinite if there was none."""
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
        """Returns True if the request was answered within the objective."""
        pairs = ((objective.ttft, self.ttft), (objective.itl, self.itl), (objective.e2e, self.e2e))
        return self.ok and all(limit is None or value <= limit for limit, value in pairs)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The stack at one moment. Each name with prefill_ or decode_ is of that pool.

    A worker with both stages is in both pools. Its time counts in each, and each pool counts its own steps.

    Attributes:
        workers: Number of workers, including those that are starting or draining.
        ready: Number of workers that accept work.
        target: Number of workers that the scaler requests. None means that there is no scaler.
        busy: Share of the ready workers' time spent in steps since the previous snapshot.
        waiting: Requests in the router's queue.
        arrived: Requests that arrived since the previous snapshot.
        tier_workers: Number of decode workers of each tier.
        brownout: Tiers in brownout.
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
    tier_workers: dict[str, int] = field(default_factory=dict)
    brownout: tuple[str, ...] = ()


@dataclass(slots=True)
class Counters:
    """Counters of a run. Times are in virtual seconds, except three that are real CPU seconds.

    Attributes:
        cpu_seconds: CPU time of the whole run.
        decision_seconds: CPU time of the dispatcher, without reports.
        report_seconds: CPU time of the dispatcher for workers' reports.
        prefill_worker_seconds, decode_worker_seconds: Time of the workers of each pool; see ``Snapshot``.
        worker_seconds: Time of all workers.
        prompts, local_prompts: Prompts computed, and those of them computed where their answer was written.
        prompt_tokens, cached_tokens: Tokens of these prompts, and those that were not computed.
        peer_tokens, disk_tokens: Parts of ``cached_tokens`` that came from other workers and from disk.
        new_tokens: Part of ``prompt_tokens`` that no worker had computed before.
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
    worker_seconds: float = 0.0
    prefill_busy: float = 0.0
    decode_busy: float = 0.0
    prompts: int = 0
    local_prompts: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    peer_tokens: int = 0
    disk_tokens: int = 0
    new_tokens: int = 0

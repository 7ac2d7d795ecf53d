"""A simulated request: its job in the router, its attempts on decode workers, and its outcome."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, repeat

from overfill.kv.keys import PromptKeys, root_key
from overfill.lab.simulate.decode import SimSequence
from overfill.lab.simulate.prefill import Ticket
from overfill.lab.traffic.outcome import Objective, Outcome
from overfill.lab.traffic.traces import TraceRequest
from overfill.routing.job import Job
from overfill.v1 import common_pb2, decode_pb2

_ROOT = root_key("", "")


@dataclass(eq=False, slots=True, kw_only=True)
class DecodeAttempt(SimSequence):
    """A request on one decode worker. Messages that arrive after ``over`` is set are stale.

    Attributes:
        ticket: Its prompt on the worker ``prefill``.
    """

    request: SimRequest
    worker: str
    ticket: Ticket | None = None
    prefill: str = ""
    over: bool = False


@dataclass(eq=False, slots=True)
class SimRequest:
    """A request of the trace in the simulated stack.

    Attributes:
        asked: Tier that it asks for. The job has the tier that answers.
        objective: Objective of that tier.
        first, last: Times at which the client had the first and the last token. None means not yet.
        emitted: Tokens that the router has received; the next attempt continues after them.
        error: Reason why the request ended without an answer; empty if it has one, and None if it has not ended.
    """

    trace: TraceRequest
    job: Job
    asked: str
    objective: Objective
    first: float | None = None
    last: float | None = None
    emitted: int = 0
    attempt: DecodeAttempt | None = None
    error: str | None = None

    def start(self, worker: str) -> DecodeAttempt:
        """Starts an attempt that continues the last one: it replays the emitted tokens."""
        trace, replay = self.trace, max(0, self.emitted - 1)
        self.attempt = DecodeAttempt(
            trace.prompt_tokens, trace.output_tokens, self.emitted, replay=replay, request=self, worker=worker
        )
        return self.attempt

    @property
    def ok(self) -> bool:
        return self.error == ""

    @property
    def met(self) -> bool:
        return self.objective.met(self.outcome)

    @property
    def outcome(self) -> Outcome:
        """What a client of a real stack would have noted."""
        times = () if self.first is None or self.last is None else (self.first, self.last)
        return Outcome(self.trace.arrival, times, self.error or None, counted=self.trace.output_tokens)


def make_job(name: str, trace: TraceRequest) -> Job:
    """Makes the job of a request, as the router does. The trace's block numbers replace the tokens of blocks."""
    sampling = common_pb2.SamplingParams(max_tokens=trace.output_tokens)
    start = decode_pb2.StartDecode(request_id=name, sampling=sampling)
    job = Job(start=start, prompt_token_ids=range(trace.prompt_tokens))
    if trace.blocks:
        keys = PromptKeys(_ROOT, trace.blocks[: trace.prompt_tokens // trace.block_tokens])

        def block_keys(block_size: int) -> Iterator[int]:
            # Where blocks are smaller than the trace's, each of the trace's has several: the same key stands for all.
            times = max(1, trace.block_tokens // block_size)
            return chain.from_iterable(repeat(key, times) for key in keys(1))

        job.block_keys = block_keys
    return job


def answer_keys(trace: TraceRequest) -> list[int]:
    """Returns the keys of all full blocks of a request's prompt and answer; empty if they are unknown."""
    full = trace.prompt_tokens // trace.block_tokens
    return list(PromptKeys(_ROOT, (*trace.blocks[:full], *trace.answer_blocks))(1)) if trace.answer_blocks else []

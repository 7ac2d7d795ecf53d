"""Which requests a test sends: synthetic ones or those of a trace, shared out among the processes of the test."""

from __future__ import annotations

import time
from array import array
from collections.abc import Iterator
from pathlib import Path

from overfill.lab.loadtest.plan import LoadPlan
from overfill.lab.traffic.traces import TraceRequest, read_trace, scale_lengths, set_rate, synthetic


class Workload:
    """The requests of a plan, by ordinal; the same in every process.

    Where blocks of a trace have the same hash, prompts have the same tokens there, whichever process sends them.

    Attributes:
        total: how many are sent; None when only the time ends the test.

    Raises:
        InvalidRequest: the trace cannot be read, or an answer of it is longer than the plan allows.
    """

    def __init__(self, plan: LoadPlan) -> None:
        self._vocab_size = plan.vocab_size
        self._prompts: dict[int, array[int]] = {}
        if plan.trace is not None:
            self._requests = _traced(plan, Path(plan.trace))
        elif plan.open_loop:
            assert plan.rate is not None
            count = plan.requests or int(plan.rate * (plan.seconds or 0.0) * 2) + 100
            self._requests = synthetic(count, "poisson", plan.rate, plan.prompt_tokens, plan.output_tokens, plan.seed)
        else:
            self._requests = [TraceRequest(0.0, plan.prompt_tokens, plan.output_tokens)]
        if plan.open_loop:
            if plan.duration is not None:
                self._requests = [r for r in self._requests if r.arrival < plan.duration]
            self.total: int | None = len(self._requests)
        else:
            self.total = plan.requests

    def __getitem__(self, ordinal: int) -> TraceRequest:
        """A shorter list begins again."""
        return self._requests[ordinal % len(self._requests)]

    def prompt(self, ordinal: int) -> list[int]:
        """Its token ids."""
        ready = self._prompts.pop(ordinal, None)
        return self[ordinal].prompt(self._vocab_size, ordinal) if ready is None else ready.tolist()

    def prepare(self, shard: ProcessShard, seconds: float) -> None:
        """Makes prompts beforehand, so that making one does not delay the tokens of others; for ``seconds`` at most."""
        began = time.monotonic()
        for ordinal in shard.ordinals():
            if time.monotonic() - began > seconds:
                return
            self._prompts[ordinal] = array("I", self[ordinal].prompt(self._vocab_size, ordinal))

    @property
    def last_arrival(self) -> float:
        """Seconds after the start."""
        return self._requests[-1].arrival


class ProcessShard:
    """The ordinals that fall to process ``index`` of ``processes``: every ``processes``-th one. Each is given once."""

    def __init__(self, total: int | None, index: int, processes: int) -> None:
        self._total = total
        self._next = index
        self._processes = processes

    def take(self) -> int | None:
        """The next ordinal; None when none is left."""
        if self._total is not None and self._next >= self._total:
            return None
        ordinal, self._next = self._next, self._next + self._processes
        return ordinal

    def ordinals(self) -> Iterator[int]:
        """Those that are left, without taking them."""
        ordinal = self._next
        while self._total is None or ordinal < self._total:
            yield ordinal
            ordinal += self._processes


def _traced(plan: LoadPlan, path: Path) -> list[TraceRequest]:
    requests = scale_lengths(read_trace(path, plan.requests), plan.length_scale, plan.longest)
    return requests if plan.rate is None else set_rate(requests, plan.rate)

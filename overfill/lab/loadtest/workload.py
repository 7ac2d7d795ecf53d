"""The requests of a load test, synthetic or from a trace, and their distribution among processes."""

from __future__ import annotations

import random
import time
from array import array
from collections.abc import Iterator
from pathlib import Path

from overfill.lab.loadtest.plan import LoadPlan
from overfill.lab.traffic.traces import TraceRequest, read_trace, scale_lengths, set_rate, synthetic


class Workload:
    """The requests of a plan, by ordinal. They are the same in every process.

    Blocks of a trace with the same hash have the same tokens in every process.

    Attributes:
        total: Number of requests. None means that only the duration ends the test.

    Raises:
        InvalidRequest: The trace cannot be read, or one of its answers is longer than the plan allows.
    """

    def __init__(self, plan: LoadPlan) -> None:
        self._vocab_size = plan.vocab_size
        self._tiers, self._seed = plan.tiers, plan.seed
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
        """Returns a request. After the last one the list begins again."""
        return self._requests[ordinal % len(self._requests)]

    def prompt(self, ordinal: int) -> list[int]:
        """Returns the token ids of a request's prompt."""
        ready = self._prompts.pop(ordinal, None)
        return self[ordinal].prompt(self._vocab_size, ordinal) if ready is None else ready.tolist()

    def tier(self, ordinal: int) -> str:
        """Returns the tier that a request names; empty means none. The same in every process."""
        chooser = random.Random(f"tier {self._seed} {ordinal}")
        return chooser.choices(list(self._tiers), list(self._tiers.values()))[0]

    def prepare(self, shard: ProcessShard, seconds: float) -> None:
        """Makes prompts for at most ``seconds``, so that making one later does not delay other requests' tokens."""
        began = time.monotonic()
        for ordinal in shard.ordinals():
            if time.monotonic() - began > seconds:
                return
            self._prompts[ordinal] = array("I", self[ordinal].prompt(self._vocab_size, ordinal))

    @property
    def last_arrival(self) -> float:
        """Seconds from the start to the last arrival."""
        return self._requests[-1].arrival


class ProcessShard:
    """The ordinals that process ``index`` of ``processes`` sends: every ``processes``-th one. Each is returned once."""

    def __init__(self, total: int | None, index: int, processes: int) -> None:
        self._total = total
        self._next = index
        self._processes = processes

    def take(self) -> int | None:
        """Returns the next ordinal. None means that none is left."""
        if self._total is not None and self._next >= self._total:
            return None
        ordinal, self._next = self._next, self._next + self._processes
        return ordinal

    def ordinals(self) -> Iterator[int]:
        """Yields the ordinals that are left, without taking them."""
        ordinal = self._next
        while self._total is None or ordinal < self._total:
            yield ordinal
            ordinal += self._processes


def _traced(plan: LoadPlan, path: Path) -> list[TraceRequest]:
    requests = scale_lengths(read_trace(path, plan.requests), plan.length_scale, plan.longest)
    return requests if plan.rate is None else set_rate(requests, plan.rate)

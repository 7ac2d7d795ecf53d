"""One load test in one locust process: its plan, its share of the requests, the outcomes so far, and its clock."""

from __future__ import annotations

import time
from typing import Any

from overfill.lab.loadtest.measure import from_record, to_record
from overfill.lab.loadtest.plan import LoadPlan
from overfill.lab.loadtest.workload import ProcessShard, Workload
from overfill.lab.traffic.outcome import Outcome

PREPARE_SECONDS = 60.0
"""Most time for making prompts before the first request; the rest are made as they are sent."""

_SLACK = 30.0
"""Seconds beyond the last request's own timeout, after which a process that reports nothing is not waited for."""


class LoadTestRun:
    """Of a process that sends requests, or of the master, which collects what the others report.

    Attributes:
        plan, workload: what is asked.
        share: what this process sends; None until the test starts here.
        outcomes: finished requests; on a worker, those that it has not reported yet.
        broken: why nothing can be measured; None while it can.
    """

    def __init__(self, plan: LoadPlan) -> None:
        self.set_plan(plan)
        self.shard: ProcessShard | None = None
        self.outcomes: list[Outcome] = []
        self.failure: str | None = None
        # The same in all processes of a test as far as their clocks agree, and steady within each.
        self._anchor = time.time() - time.perf_counter()

    def clock(self) -> float:
        """Seconds since the epoch."""
        return self._anchor + time.perf_counter()

    def set_plan(self, plan: LoadPlan) -> None:
        """Takes another plan. Raises InvalidRequest when its trace cannot be read."""
        self.plan = plan
        self.workload = Workload(plan)

    def begin(self, index: int, processes: int) -> None:
        """This process is number ``index`` of ``processes`` that send."""
        self.shard = ProcessShard(self.workload.total, index, processes)
        if self.workload.total is not None:
            self.workload.prepare(self.shard, PREPARE_SECONDS)

    def is_over(self, elapsed: float) -> bool:
        """Whether a test that has run for ``elapsed`` seconds has all its outcomes, or will get no more."""
        total = self.workload.total
        if self.failure is not None or (total is not None and len(self.outcomes) >= total):
            return True
        if self.plan.open_loop:
            return elapsed > PREPARE_SECONDS + self.workload.last_arrival + self.plan.timeout + _SLACK
        assert self.plan.seconds is not None
        return elapsed >= self.plan.seconds

    def all_outcomes(self) -> list[Outcome]:
        """With a failed one for each that never reported back, as when its process died."""
        total = self.workload.total if self.plan.open_loop else None
        lost = max(0, (total or 0) - len(self.outcomes))
        latest = max((outcome.due for outcome in self.outcomes), default=0.0)
        return [*self.outcomes, *[Outcome(latest, (), "never reported back")] * lost]

    def report(self, data: dict[str, Any]) -> None:
        """Moves the outcomes into what a worker sends to the master."""
        data["overfill"] = {"outcomes": [to_record(outcome) for outcome in self.outcomes], "failure": self.failure}
        self.outcomes.clear()

    def collect(self, data: dict[str, Any]) -> None:
        """Takes what a worker sent."""
        told = data.get("overfill", {})
        self.outcomes += [from_record(record) for record in told.get("outcomes", ())]
        self.failure = self.failure or told.get("failure")

"""State of a load test in one locust process: plan, this process's requests, outcomes, and clock."""

from __future__ import annotations

import time
from typing import Any

from overfill.lab.loadtest.measure import from_record, to_record
from overfill.lab.loadtest.plan import LoadPlan
from overfill.lab.loadtest.workload import ProcessShard, Workload
from overfill.lab.traffic.outcome import Outcome

PREPARE_SECONDS = 60.0
"""Maximum seconds for making prompts before the first request. The others are made when they are sent."""

_SLACK = 30.0
"""Seconds after the last request's timeout, after which the test stops waiting for processes that do not report."""


class LoadTestRun:
    """A load test in a process that sends requests, or in the master, which collects the reports of the others.

    Attributes:
        plan, workload: Options and requests of the test.
        shard: Requests that this process sends. None means that the test has not started here.
        outcomes: Outcomes of finished requests; on a worker, those not reported yet.
        failure: Reason why nothing can be measured. None means that it can.
    """

    def __init__(self, plan: LoadPlan) -> None:
        self.set_plan(plan)
        self.shard: ProcessShard | None = None
        self.outcomes: list[Outcome] = []
        self.failure: str | None = None
        # The anchor makes times comparable between processes; perf_counter keeps them steady within one.
        self._anchor = time.time() - time.perf_counter()

    def clock(self) -> float:
        """Seconds since the epoch."""
        return self._anchor + time.perf_counter()

    def set_plan(self, plan: LoadPlan) -> None:
        """Replaces the plan. Raises InvalidRequest when its trace cannot be read."""
        self.plan = plan
        self.workload = Workload(plan)

    def begin(self, index: int, processes: int) -> None:
        """Starts the test in this process, number ``index`` of ``processes`` that send requests."""
        self.shard = ProcessShard(self.workload.total, index, processes)
        if self.workload.total is not None:
            self.workload.prepare(self.shard, PREPARE_SECONDS)

    def is_over(self, elapsed: float) -> bool:
        """Returns True if the test, after ``elapsed`` seconds, has all its outcomes or will get no more."""
        total = self.workload.total
        if self.failure is not None or (total is not None and len(self.outcomes) >= total):
            return True
        if self.plan.open_loop:
            return elapsed > PREPARE_SECONDS + self.workload.last_arrival + self.plan.timeout + _SLACK
        assert self.plan.seconds is not None
        return elapsed >= self.plan.seconds

    def all_outcomes(self) -> list[Outcome]:
        """Returns all outcomes, with a failed one for each request of a process that never reported."""
        total = self.workload.total if self.plan.open_loop else None
        lost = max(0, (total or 0) - len(self.outcomes))
        latest = max((outcome.due for outcome in self.outcomes), default=0.0)
        return [*self.outcomes, *[Outcome(latest, (), "never reported back")] * lost]

    def report(self, data: dict[str, Any]) -> None:
        """Moves the outcomes into ``data``, which a worker sends to the master."""
        data["overfill"] = {"outcomes": [to_record(outcome) for outcome in self.outcomes], "failure": self.failure}
        self.outcomes.clear()

    def collect(self, data: dict[str, Any]) -> None:
        """Adds the outcomes that a worker sent."""
        reported = data.get("overfill", {})
        self.outcomes += [from_record(record) for record in reported.get("outcomes", ())]
        self.failure = self.failure or reported.get("failure")

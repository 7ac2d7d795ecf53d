"""Locust users for gRPC and for OpenAI endpoints. Importing this module patches the process (gevent).

Each answer adds three kinds of entries to locust's statistics: ``TTFT``, ``ITL`` (one per gap between two tokens) and
``end to end``, which also counts failures.
"""

from __future__ import annotations

from typing import ClassVar

import gevent
import grpc.experimental.gevent
from gevent.pool import Group
from locust import User, task
from locust.env import Environment

from overfill.lab.loadtest.measure import measure
from overfill.lab.loadtest.plan import LoadPlan
from overfill.lab.loadtest.run import LoadTestRun
from overfill.lab.loadtest.transports import GrpcTransport, OpenAiTransport
from overfill.lab.traffic.outcome import Outcome, RequestFailed

grpc.experimental.gevent.init_gevent()  # before the first channel; otherwise gRPC's threads block all greenlets

_IDLE_SECONDS = 0.2


class LoadUser(User):
    """Sends a request after each answer. In an open loop, sends all requests of its process when they are due."""

    abstract = True
    protocol: ClassVar[str]
    transport: ClassVar[type[GrpcTransport] | type[OpenAiTransport]]

    def __init__(self, environment: Environment) -> None:
        super().__init__(environment)
        self._load_run = run_of(environment)
        self._transport = self.transport(self._load_run.plan)

    def on_stop(self) -> None:
        self._transport.close()

    @task
    def ask(self) -> None:
        shard = self._load_run.shard
        if shard is None:
            gevent.sleep(_IDLE_SECONDS)
        elif self._load_run.plan.open_loop:
            self._send_when_due()
        elif (ordinal := shard.take()) is None:
            gevent.sleep(_IDLE_SECONDS)
        else:
            self._send(ordinal, None)

    def _send_when_due(self) -> None:
        run, running = self._load_run, Group()
        assert run.shard is not None
        start = run.clock()
        while (ordinal := run.shard.take()) is not None:
            due = start + run.workload[ordinal].arrival
            gevent.sleep(max(0.0, due - run.clock()))
            running.spawn(self._send, ordinal, due)
        running.join()
        gevent.sleep(_IDLE_SECONDS)

    def _send(self, ordinal: int, due: float | None) -> None:
        run = self._load_run
        request = run.workload[ordinal]
        prompt = run.workload.prompt(ordinal)
        tier = run.workload.tier(ordinal)
        outcome = measure(self._transport, prompt, request.output_tokens, run.plan.timeout, due, run.clock, tier)
        run.outcomes.append(outcome)
        self._fire(outcome, len(prompt))

    def _fire(self, outcome: Outcome, prompt_tokens: int) -> None:
        def fire(name: str, seconds: float, exception: Exception | None = None) -> None:
            self.environment.events.request.fire(
                request_type=self.protocol,
                name=name,
                response_time=1e3 * seconds,
                response_length=outcome.tokens,
                exception=exception,
                context={"prompt_tokens": prompt_tokens},
            )

        if outcome.ok:
            fire("TTFT", outcome.ttft)
            for gap in outcome.gaps:
                fire("ITL", gap)
            fire("end to end", outcome.e2e)
        else:
            fire("end to end", self._load_run.clock() - outcome.due, RequestFailed(outcome.error))


class GrpcUser(LoadUser):
    """A user that sends requests over gRPC."""

    protocol = "gRPC"
    transport = GrpcTransport


class OpenAiUser(LoadUser):
    """A user that sends requests to an OpenAI endpoint and streams the answers."""

    protocol = "OpenAI"
    transport = OpenAiTransport


def user_class(plan: LoadPlan) -> type[LoadUser]:
    """Returns the class of users for the plan's target."""
    return OpenAiUser if plan.http else GrpcUser


def attach(environment: Environment, run: LoadTestRun) -> None:
    """Stores ``run`` in locust's environment."""
    environment.overfill = run  # type: ignore[attr-defined]


def run_of(environment: Environment) -> LoadTestRun:
    run = environment.overfill  # type: ignore[attr-defined]
    assert isinstance(run, LoadTestRun)
    return run

"""Locust users for gRPC, for OpenAI endpoints, and for tasks of one's own. Importing patches the process (gevent).

Each answer adds three kinds of entries to locust's statistics: ``TTFT``, ``ITL`` (one per gap between two tokens) and
``end to end``, which also counts failures.
"""

from __future__ import annotations

import os
import time
from typing import ClassVar, Unpack

import gevent
import grpc.experimental.gevent
from gevent.pool import Group
from locust import User, task
from locust.env import Environment
from locust.exception import RescheduleTask

from overfill.client import Answer, Client, Options, Prompt
from overfill.errors import OverfillError
from overfill.lab.loadtest.measure import measure
from overfill.lab.loadtest.plan import API_KEY, LoadPlan
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
        _fire(self.environment, self.protocol, "", outcome, run.clock(), len(prompt))


class GrpcUser(LoadUser):
    """A user that sends requests over gRPC."""

    protocol = "gRPC"
    transport = GrpcTransport


class OpenAiUser(LoadUser):
    """A user that sends requests to an OpenAI endpoint and streams the answers."""

    protocol = "OpenAI"
    transport = OpenAiTransport


class ClientUser(User):
    """A user with a client of the stack, for locust files with tasks of one's own.

    ``--host`` is the router's address, with or without ``grpc://``. The variable OVERFILL_API_KEY has the key.
    """

    abstract = True
    host = "grpc://127.0.0.1:7600"

    def __init__(self, environment: Environment) -> None:
        super().__init__(environment)
        self.client = Client(self.host.removeprefix("grpc://"), api_key=os.environ.get(API_KEY) or None)

    def on_stop(self) -> None:
        self.client.close()

    def ask(self, name: str, prompt: Prompt, **options: Unpack[Options]) -> Answer:
        """Sends a request and returns the whole answer; locust's statistics show it as ``name TTFT`` and so on.

        Raises:
            RescheduleTask: The request failed. The statistics count it, and locust goes on with another task.
        """
        due, times = time.perf_counter(), list[float]()
        answer: Answer | None = None
        error: str | None = None
        try:
            with self.client.stream(prompt, **options) as stream:
                for delta in stream:
                    times += [time.perf_counter()] * len(delta.token_ids)
                answer = stream.answer
            error = None if times else "no token arrived"
        except OverfillError as failure:
            error = f"{type(failure).__name__}: {failure}"
        prompt_tokens = answer.usage.prompt_tokens if answer is not None else 0
        outcome = Outcome(due, tuple(times), error)
        _fire(self.environment, GrpcUser.protocol, f"{name} ", outcome, time.perf_counter(), prompt_tokens)
        if answer is None or error is not None:
            raise RescheduleTask(error)
        return answer


def _fire(
    environment: Environment, protocol: str, prefix: str, outcome: Outcome, now: float, prompt_tokens: int
) -> None:
    """Adds an outcome to locust's statistics; ``now`` is the time at which a failed request ended."""

    def fire(name: str, seconds: float, exception: Exception | None = None) -> None:
        environment.events.request.fire(
            request_type=protocol,
            name=f"{prefix}{name}",
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
        fire("end to end", now - outcome.due, RequestFailed(outcome.error))


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

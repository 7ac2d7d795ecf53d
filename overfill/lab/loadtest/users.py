"""Locust users whose answers are timed token by token. Importing patches the process (gevent).

Each answer adds three kinds of entries to locust's statistics: ``TTFT``, ``ITL`` (one per gap between two tokens) and
``end to end``, which also counts failures. ``overfill loadtest`` does not use locust.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator
from itertools import accumulate
from typing import ClassVar, Unpack

import grpc.experimental.gevent
from locust import User
from locust.env import Environment
from locust.exception import RescheduleTask

from overfill.client import Answer, Client, Options, Prompt
from overfill.errors import OverfillError
from overfill.lab.traffic.outcome import Outcome, RequestFailed

grpc.experimental.gevent.init_gevent()  # before the first channel; otherwise gRPC's threads block all greenlets


class TimedUser(User):
    """A user whose answers are timed token by token."""

    abstract = True
    protocol: ClassVar[str]

    def timed(self, name: str, counts: Iterable[int]) -> None:
        """Adds a request to locust's statistics. ``counts`` sends it, and yields the number of tokens received so far.

        Raises:
            RescheduleTask: The request failed. The statistics count it, and locust goes on with another task.
        """
        due, times = time.perf_counter(), list[float]()

        def fire(what: str, seconds: float, exception: Exception | None = None) -> None:
            self.environment.events.request.fire(
                request_type=self.protocol,
                name=f"{name} {what}".strip(),
                response_time=1e3 * seconds,
                response_length=len(times),
                exception=exception,
                context={},
            )

        try:
            for tokens in counts:
                times += [time.perf_counter()] * (tokens - len(times))
            if not times:
                raise RequestFailed("no token arrived")
        except OverfillError as error:
            fire("end to end", time.perf_counter() - due, error)
            raise RescheduleTask(str(error)) from error
        outcome = Outcome(due, tuple(times))
        fire("TTFT", outcome.ttft)
        for gap in outcome.gaps:
            fire("ITL", gap)
        fire("end to end", outcome.e2e)


class ClientUser(TimedUser):
    """A user with a client of the stack, for locust files with tasks of one's own.

    ``--host`` is the router's address, with or without ``grpc://``. The variable OVERFILL_API_KEY has the key.
    """

    abstract = True
    protocol = "gRPC"
    host = "grpc://127.0.0.1:7600"

    def __init__(self, environment: Environment) -> None:
        super().__init__(environment)
        self.client = Client(self.host.removeprefix("grpc://"), api_key=os.environ.get("OVERFILL_API_KEY") or None)

    def on_stop(self) -> None:
        self.client.close()

    def ask(self, name: str, prompt: Prompt, **options: Unpack[Options]) -> Answer:
        """Sends a request and returns the whole answer; locust's statistics show it as ``name TTFT`` and so on.

        Raises:
            RescheduleTask: The request failed. The statistics count it, and locust goes on with another task.
        """
        answers: list[Answer] = []

        def counts() -> Iterator[int]:
            with self.client.stream(prompt, **options) as stream:
                yield from accumulate(len(delta.token_ids) for delta in stream)
                answers.append(stream.answer)

        self.timed(name, counts())
        return answers[0]

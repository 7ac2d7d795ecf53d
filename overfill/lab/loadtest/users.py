"""Locust users: for gRPC, for OpenAI endpoints, and for tasks of one's own. Importing patches the process (gevent).

Each answer adds three kinds of entries to locust's statistics: ``TTFT``, ``ITL`` (one per gap between two tokens) and
``end to end``, which also counts failures. ``overfill loadtest`` does not use locust.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Iterable, Iterator
from itertools import accumulate
from typing import Any, ClassVar, Unpack

import grpc.experimental.gevent
from locust import User, task
from locust.argument_parser import LocustArgumentParser
from locust.env import Environment
from locust.exception import RescheduleTask
from locust.runners import WorkerRunner
from requests import RequestException, Session

from overfill.client import Answer, Client, Options, Prompt, SamplingParams
from overfill.errors import OverfillError
from overfill.lab.traffic import openai
from overfill.lab.traffic.outcome import Outcome, RequestFailed
from overfill.lab.traffic.traces import TraceRequest

grpc.experimental.gevent.init_gevent()  # before the first channel; otherwise gRPC's threads block all greenlets

_API_KEY = "OVERFILL_API_KEY"
_TIMEOUT = (10.0, 600.0)
"""Maximum seconds for a connection to an OpenAI endpoint, and between two parts of its answer."""


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
        self.client = Client(self.host.removeprefix("grpc://"), api_key=os.environ.get(_API_KEY) or None)

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


class GrpcUser(ClientUser):
    """Sends synthetic prompts to a stack over gRPC, each after the answer to the last one."""

    @task
    def synthetic(self) -> None:
        given = self.environment.parsed_options
        sampling = SamplingParams(temperature=0, max_tokens=given.output_tokens, ignore_eos=True)
        self.ask("", _prompt(given), sampling=sampling, tier=given.tier)


class OpenAiUser(TimedUser):
    """Sends synthetic prompts to an OpenAI endpoint and streams the answers. ``--host`` includes ``/v1``."""

    protocol = "OpenAI"
    host = "http://127.0.0.1:8000/v1"

    def on_start(self) -> None:
        self._session, self._model = Session(), ""
        if key := os.environ.get(_API_KEY):
            self._session.headers["Authorization"] = f"Bearer {key}"

    def on_stop(self) -> None:
        self._session.close()

    @task
    def synthetic(self) -> None:
        self.timed("", self._counts(self.environment.parsed_options))

    def _counts(self, given: Any) -> Iterator[int]:
        url, events, rest = self.host.rstrip("/"), openai.CompletionEvents(), b""
        try:
            if not self._model:
                self._model = self._session.get(f"{url}/models", timeout=_TIMEOUT).json()["data"][0]["id"]
            body = openai.completion_body(
                self._model, _prompt(given), given.output_tokens, extensions=True, tier=given.tier
            )
            with self._session.post(f"{url}/completions", json=body, stream=True, timeout=_TIMEOUT) as response:
                if response.status_code != 200:
                    raise RequestFailed(f"HTTP {response.status_code}: {openai.error_message(response.text)}")
                for chunk in response.iter_content(None):  # iter_lines would wait for chunks of its own size
                    *lines, rest = (rest + chunk).split(b"\n")
                    yield from map(events.push, lines)
        except (RequestException, ValueError, LookupError, TypeError) as error:
            raise RequestFailed(f"{type(error).__name__}: {error}") from error
        events.end()


def add_options(parser: LocustArgumentParser, **_: Any) -> None:
    """Adds the options of the synthetic requests to locust's."""
    group = parser.add_argument_group("OverFill", "Synthetic requests.")
    group.add_argument("--prompt-tokens", type=int, default=512, help="Length of a prompt.")
    group.add_argument("--output-tokens", type=int, default=128, help="Length of an answer.")
    group.add_argument("--vocab-size", type=int, default=32_000, help="Prompts are random token ids below this number.")
    group.add_argument("--tier", default="", help="Tier of the requests; empty means the server's default tier.")


def choose_user(environment: Environment, **_: Any) -> None:
    """Keeps the class of users that the scheme of ``--host`` names, unless the command line names classes."""
    given: Any = environment.parsed_options
    if not (given.user_classes or given.class_picker or isinstance(environment.runner, WorkerRunner)):
        chosen = OpenAiUser if (environment.host or "").startswith("http") else GrpcUser
        environment.user_classes[:] = [chosen]


def _prompt(given: Any) -> list[int]:
    # The seed is random, so that no two processes send the same prompts.
    return TraceRequest(0.0, given.prompt_tokens, given.output_tokens).prompt(given.vocab_size, random.getrandbits(64))

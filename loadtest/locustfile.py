"""Locust file for ``locust -f loadtest/locustfile.py``: users that send synthetic prompts to a stack or an endpoint.

The scheme of ``--host`` decides which users run: those of OpenAI's API for http and https, or else those of gRPC.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from typing import Any

from locust import events, task
from locust.argument_parser import LocustArgumentParser
from locust.env import Environment
from locust.runners import WorkerRunner
from requests import RequestException, Session

from overfill.client import SamplingParams
from overfill.lab.loadtest.users import ClientUser, TimedUser
from overfill.lab.traffic import openai
from overfill.lab.traffic.outcome import RequestFailed
from overfill.lab.traffic.traces import TraceRequest

_TIMEOUT = (10.0, 600.0)
"""Maximum seconds for a connection to an OpenAI endpoint, and between two parts of its answer."""


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
        if key := os.environ.get("OVERFILL_API_KEY"):
            self._session.headers["Authorization"] = f"Bearer {key}"

    def on_stop(self) -> None:
        self._session.close()

    @task
    def synthetic(self) -> None:
        self.timed("", self._counts(self.environment.parsed_options))

    def _counts(self, given: Any) -> Iterator[int]:
        url, answer, rest = self.host.rstrip("/"), openai.CompletionEvents(), b""
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
                    yield from map(answer.push, lines)
        except (RequestException, ValueError, LookupError, TypeError) as error:
            raise RequestFailed(f"{type(error).__name__}: {error}") from error
        answer.end()


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


events.init_command_line_parser.add_listener(add_options)
events.init.add_listener(choose_user)

"""Measures the CPU of the APIs over HTTP beside that of chat completions (``overfill bench router --apis``)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from overfill.lab.measurement import Measurement
from overfill.lab.bench.router.bare_server import SendingPace
from overfill.lab.bench.router.load import Api, LoadProcesses
from overfill.lab.bench.router.windows import CLIENTS, WORKERS, Windows, paced_stack

_APIS: tuple[Api, ...] = ("chat", "responses", "messages")

_ANSWER = 1000
"""Tokens of a long answer."""

_STREAMS = 256
"""Concurrent requests."""

_RATIO = 1.25
"""Bound of the CPU of an API over that of chat completions."""

_LOAD = 0.25
"""Share of the router's core, for chat completions, that the tokens of long answers take."""

Rounds = dict[Api, list[float]]
"""API -> figure of each round, in microseconds of CPU."""


def measure_apis(pair: Path, seconds: float, rounds: int = 5) -> list[Measurement]:
    """Measures CPU per request and per token in rounds, in which the APIs take turns. Takes 40 times ``seconds``.

    The workers of a first stack have no delay, and each answer has one token. Those of a second stack send so few
    tokens that the router merges none.
    """
    requests: Rounds = {api: [] for api in _APIS}
    tokens: Rounds = {api: [] for api in _APIS}
    merged: Rounds = {api: [] for api in _APIS}
    with LoadProcesses(CLIENTS) as clients:
        windows = Windows(clients, seconds)
        with paced_stack(pair, SendingPace(), _STREAMS) as (server, _):
            for _ in range(rounds):
                for api in _APIS:
                    window = windows.measure(replace(server, api=api), 1, _STREAMS)
                    requests[api].append(window.cpu_us(window.counts.ended))
            window = windows.measure(server, _ANSWER, _STREAMS)
            rate = _LOAD * window.per_core(window.counts.events)
        with paced_stack(pair, SendingPace(per_sequence=WORKERS / rate, workers=WORKERS), _STREAMS) as (server, _):
            for _ in range(rounds):
                for api in _APIS:
                    window = windows.measure(replace(server, api=api), _ANSWER, _STREAMS)
                    # Answers that end in the window are followed by requests, whose cost is known.
                    begun = window.counts.begun * requests[api][-1]
                    tokens[api].append(window.cpu_us(window.counts.tokens) - begun / max(1, window.counts.tokens))
                    merged[api].append(window.tokens_per_event)
    found = [*_beside_chat("request_cpu", requests), *_beside_chat("token_cpu", tokens)]
    found += [Measurement.median(f"{api}_tokens_per_event", merged[api], "tokens") for api in _APIS]
    return [*found, Measurement("failed_requests", windows.failed, "requests", 0)]


def _beside_chat(name: str, rounds: Rounds) -> Sequence[Measurement]:
    found = [Measurement.median(f"{api}_{name}", rounds[api], "us") for api in _APIS]
    for api in _APIS[1:]:
        ratios = [one / chat for one, chat in zip(rounds[api], rounds["chat"], strict=True)]
        found.append(Measurement.median(f"{api}_{name}_ratio", ratios, "x", _RATIO))
    return found

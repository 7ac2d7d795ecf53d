"""One request to a server, timed; and outcomes as plain records, to be sent between processes. Knows no locust."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any, Protocol

from overfill.client.answers import Timing
from overfill.lab.bench.serve.load import RequestFailed
from overfill.lab.traffic.outcome import Outcome

OnTokens = Callable[[int], None]
"""Called with the number of tokens so far; ``transport.ask`` calls it for every message."""


class Transport(Protocol):
    """A way to ask a server; safe to use from several greenlets."""

    def ask(
        self, prompt: Sequence[int], max_tokens: int, timeout: float, on_tokens: Callable[[int], None]
    ) -> Timing | None:
        """Returns at the end of the answer; calls ``on_tokens`` with the number of tokens so far, with every message.

        Raises:
            RequestFailed: the server refused, broke off or took too long.
        """

    def close(self) -> None: ...


def measure(
    transport: Transport,
    prompt: Sequence[int],
    max_tokens: int,
    timeout: float,
    due: float | None,
    clock: Callable[[], float],
) -> Outcome:
    """Sends one request and says what on_tokens of it. ``due``: None when it is due as it is sent."""
    times: list[float] = []
    tokens = 0
    sent = clock()
    timing: Timing | None = None
    error: str | None = None

    def on_tokens(total: int) -> None:
        nonlocal tokens
        tokens = total
        times.extend([clock()] * (total - len(times)))

    try:
        timing = transport.ask(prompt, max_tokens, timeout, on_tokens)
        if not times:
            error = "no token on_tokens"
    except RequestFailed as failure:
        error = str(failure)
    return Outcome(sent if due is None else due, tuple(times), error, sent, timing, tokens)


def to_record(outcome: Outcome) -> dict[str, Any]:
    """Lists, numbers and text only."""
    return asdict(outcome) | {"times": list(outcome.times)}


def from_record(record: dict[str, Any]) -> Outcome:
    timing = None if record["timing"] is None else Timing(**record["timing"])
    return Outcome(**(record | {"times": tuple(record["times"]), "timing": timing}))


def relative_to_start(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """In order of when they were due, all times counted from the first of these."""
    start = min((outcome.due for outcome in outcomes), default=0.0)
    return [
        replace(
            outcome,
            due=outcome.due - start,
            sent=None if outcome.sent is None else outcome.sent - start,
            times=tuple(t - start for t in outcome.times),
        )
        for outcome in sorted(outcomes, key=lambda outcome: outcome.due)
    ]

"""Times one request, and converts outcomes to records that processes can exchange. Independent of locust."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

from overfill.client.answers import Timing
from overfill.lab.traffic.outcome import Outcome, RequestFailed


@dataclass(frozen=True, slots=True)
class Reported:
    """What a server says about one answer: its timing, and the tier that wrote its end. None and empty mean unknown."""

    timing: Timing | None = None
    tier: str = ""


class Transport(Protocol):
    """Sends requests to a server. Safe to use from several greenlets."""

    def ask(
        self, prompt: Sequence[int], max_tokens: int, timeout: float, on_tokens: Callable[[int], None], tier: str
    ) -> Reported:
        """Sends a request, to ``tier`` unless that is empty, and calls ``on_tokens`` for every message.

        Raises:
            RequestFailed: The server refused the request, ended the stream early or exceeded ``timeout``.
        """

    def close(self) -> None: ...


def measure(
    transport: Transport,
    prompt: Sequence[int],
    max_tokens: int,
    timeout: float,
    due: float | None,
    clock: Callable[[], float],
    tier: str = "",
) -> Outcome:
    """Sends one request and returns its outcome.

    Args:
        due: Time at which the request is due. None means when it is sent.
        tier: Tier that the request names; empty means none.
    """
    times: list[float] = []
    tokens = 0
    sent = clock()
    reported = Reported()
    error: str | None = None

    def on_tokens(total: int) -> None:
        nonlocal tokens
        tokens = total
        times.extend([clock()] * (total - len(times)))

    try:
        reported = transport.ask(prompt, max_tokens, timeout, on_tokens, tier)
        if not times:
            error = "no token arrived"
    except RequestFailed as failure:
        error = str(failure)
    return Outcome(
        sent if due is None else due, tuple(times), error, sent, reported.timing, tokens, tier, reported.tier
    )


def to_record(outcome: Outcome) -> dict[str, Any]:
    """Converts an outcome to lists, numbers and text."""
    return asdict(outcome) | {"times": list(outcome.times)}


def from_record(record: dict[str, Any]) -> Outcome:
    timing = None if record["timing"] is None else Timing(**record["timing"])
    return Outcome(**(record | {"times": tuple(record["times"]), "timing": timing}))


def relative_to_start(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """Sorts outcomes by due time and makes all times relative to the first one."""
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

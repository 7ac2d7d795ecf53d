"""Outcome of one request as its client measured it, and the objective that it should meet. No I/O."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from overfill.client import TTFT_PARTS, Timing
from overfill.errors import InvalidRequest, OverfillError

PERCENTILES = (50, 90, 99)
_SECONDS = re.compile(r"((?:\d+(?:\.\d*)?|\.\d+)(?:e-?\d+)?)(ms|s)?")


class RequestFailed(OverfillError):
    """The server did not answer a request completely; the message says why."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """Outcome of one request. Times are seconds since the run began, on the client's clock.

    Attributes:
        due: Time at which the request should have been sent. Latencies count from here, so that a client that sends
            late does not make the server look faster.
        times: Arrival time of each token. Tokens of one message have the same time.
        error: Reason for the failure. None means success.
        sent: Time at which the request was sent, if known. It is later than ``due`` when the client is too slow.
        timing: The server's own breakdown of the time.
        counted: Number of tokens, if it may differ from the length of ``times``: some servers report the exact number
            only at the end, and the client had counted one token per message.
        tier: Tier that the request named; empty means none.
        written_by: Tier that wrote the end of the answer; empty means unknown.
    """

    due: float
    times: tuple[float, ...]
    error: str | None = None
    sent: float | None = None
    timing: Timing | None = None
    counted: int | None = None
    tier: str = ""
    written_by: str = ""

    @property
    def tokens(self) -> int:
        return len(self.times) if self.counted is None else self.counted

    @property
    def ok(self) -> bool:
        return self.error is None and bool(self.times)

    @property
    def ttft(self) -> float:
        """Time to first token."""
        return self.times[0] - self.due

    @property
    def e2e(self) -> float:
        return self.times[-1] - self.due

    @property
    def gaps(self) -> list[float]:
        """Seconds between each token and the next (inter-token latencies)."""
        return [b - a for a, b in zip(self.times, self.times[1:], strict=False)]

    @property
    def itl(self) -> float:
        """Mean inter-token latency; 0 for an answer of one token."""
        return (self.times[-1] - self.times[0]) / (self.tokens - 1) if self.tokens > 1 else 0.0

    @property
    def ttft_parts(self) -> dict[str, float]:
        """Seconds from sending to the first token, by the server's parts; empty if the server sent none.

        The last part, ``unattributed``, is what no other covers: the network and both of its ends.
        """
        if not self.ok or self.sent is None or self.timing is None or self.timing.ttft is None:
            return {}
        parts = {name: getattr(self.timing, name) or 0.0 for name in TTFT_PARTS}
        return parts | {"unattributed": self.times[0] - self.sent - sum(parts.values())}

    @property
    def unattributed(self) -> float | None:
        """Share of the time from sending to the first token that no part covers. None means that none is known."""
        parts = self.ttft_parts
        seen = sum(parts.values())
        return parts["unattributed"] / seen if seen > 0 else None


@dataclass(frozen=True, slots=True)
class Objective:
    """Objective of a single request: maxima, in seconds, of its TTFT, mean inter-token latency and total time."""

    ttft: float | None = None
    itl: float | None = None
    e2e: float | None = None

    @classmethod
    def parse(cls, text: str) -> Objective:
        """Parses a text such as ``ttft=2,itl=200ms``. Limits are in seconds without a unit.

        Raises:
            InvalidRequest: A name is not ttft, itl or e2e, or a value is not a positive number.
        """
        limits: dict[str, float] = {}
        for part in text.split(","):
            name, _, value = part.strip().partition("=")
            limits[name] = parse_seconds(value)
            if name not in cls.__slots__ or limits[name] <= 0:
                raise InvalidRequest(
                    "objective", f"{part.strip()!r} is not a limit such as ttft=2 (seconds), itl=200ms or e2e=30"
                )
        return cls(**limits)

    def met(self, outcome: Outcome) -> bool:
        limits = ((name, getattr(self, name)) for name in self.__slots__)
        return outcome.ok and all(limit is None or getattr(outcome, name) <= limit for name, limit in limits)

    def __str__(self) -> str:
        limits = ((name, getattr(self, name)) for name in self.__slots__)
        return ", ".join(f"{name} <= {limit:g} s" for name, limit in limits if limit is not None)


def parse_seconds(text: str) -> float:
    """Parses ``2``, ``2s`` or ``200ms``. Returns 0 for a text that is no such time."""
    found = _SECONDS.fullmatch(text)
    return 0.0 if found is None else float(found[1]) / (1e3 if found[2] == "ms" else 1)


def samples(outcomes: Sequence[Outcome], name: str) -> list[float]:
    """Returns the values of ``ttft``, ``e2e``, ``unattributed`` and ``request_itl`` per answer, of ``itl`` per gap.

    ``request_itl`` is the mean gap of each answer with several tokens.
    """
    done = [outcome for outcome in outcomes if outcome.ok]
    if name == "itl":
        return [gap for outcome in done for gap in outcome.gaps]
    if name == "request_itl":
        return [outcome.itl for outcome in done if outcome.tokens > 1]
    return [value for outcome in done if (value := getattr(outcome, name)) is not None]

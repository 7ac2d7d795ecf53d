"""What a client saw of one request, and what many such say: percentiles, throughput, goodput. Arithmetic only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from overfill.client.answers import TTFT_PARTS, Timing
from overfill.errors import InvalidRequest

PERCENTILES = (50, 90, 99)


@dataclass(frozen=True, slots=True)
class Outcome:
    """One request. Times are seconds since the run began, on the client's clock.

    Attributes:
        due: when it should have been sent; latencies count from here, so a late client does not flatter a server.
        times: when tokens came; those of one message came together.
        error: why it failed; None when it did not.
        sent: when it was sent, where that is known; later than ``due`` when the client is too slow.
        timing: where the server says that the time went.
        counted: how many tokens came, where that need not be the number of ``times``: a server that only tells at the
            end may correct what was taken for a token each.
    """

    due: float
    times: tuple[float, ...]
    error: str | None = None
    sent: float | None = None
    timing: Timing | None = None
    counted: int | None = None

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
        """Between one token and the next: inter-token latencies."""
        return [b - a for a, b in zip(self.times, self.times[1:], strict=False)]

    @property
    def itl(self) -> float:
        """Mean inter-token latency; 0 for an answer of one token."""
        return (self.times[-1] - self.times[0]) / (self.tokens - 1) if self.tokens > 1 else 0.0

    @property
    def unattributed(self) -> float | None:
        """Share of the time from sending to the first token that none of the server's parts covers: the network, and
        both ends of it. None when the server does not tell its parts."""
        if not self.ok or self.sent is None or self.timing is None or self.timing.ttft is None:
            return None
        seen = self.times[0] - self.sent
        parts = sum(getattr(self.timing, part) or 0.0 for part in TTFT_PARTS)
        return (seen - parts) / seen if seen > 0 else None


@dataclass(frozen=True, slots=True)
class Objective:
    """A request meets it when its first token came within ``ttft`` and its tokens within ``itl`` each, on average."""

    ttft: float | None = None
    itl: float | None = None
    e2e: float | None = None

    @classmethod
    def parse(cls, text: str) -> Objective:
        """From ``ttft=2,itl=0.2``, in seconds.

        Raises:
            InvalidRequest: a name is none of ttft, itl, e2e, or a value is no positive number.
        """
        limits: dict[str, float] = {}
        for part in text.split(","):
            name, _, value = part.strip().partition("=")
            try:
                limit = float(value)
            except ValueError:
                limit = 0.0
            if name not in cls.__slots__ or not limit > 0:
                raise InvalidRequest("slo", f"{part.strip()!r} is not a limit in seconds such as ttft=2 or itl=0.2")
            limits[name] = limit
        return cls(**limits)

    def met(self, outcome: Outcome) -> bool:
        pairs = ((self.ttft, "ttft"), (self.itl, "itl"), (self.e2e, "e2e"))
        return outcome.ok and all(limit is None or getattr(outcome, name) <= limit for limit, name in pairs)

    def __str__(self) -> str:
        names = ("ttft", "itl", "e2e")
        return ", ".join(f"{name} <= {getattr(self, name):g} s" for name in names if getattr(self, name) is not None)


@dataclass(frozen=True, slots=True)
class LoadFigure:
    """A number with its name and unit."""

    name: str
    value: float | None
    unit: str


def samples(outcomes: Sequence[Outcome], name: str) -> list[float]:
    """All values of one latency: ``ttft``, ``e2e`` and ``unattributed`` have one per answer, ``itl`` one per gap."""
    done = [outcome for outcome in outcomes if outcome.ok]
    if name == "itl":
        return [gap for outcome in done for gap in outcome.gaps]
    return [value for outcome in done if (value := getattr(outcome, name)) is not None]


def figures(outcomes: Sequence[Outcome], objective: Objective | None) -> list[LoadFigure]:
    """What a run comes to; latencies are None when no request finished."""
    import numpy as np  # here, since the options of a load test are read without it

    done = [outcome for outcome in outcomes if outcome.ok]
    span = max((outcome.times[-1] for outcome in done), default=0.0) - min((o.due for o in outcomes), default=0.0)
    found = []
    for name in ("ttft", "itl", "e2e"):
        values = samples(done, name)
        marks = np.percentile(values, PERCENTILES) if values else [None] * len(PERCENTILES)
        found += [
            LoadFigure(f"{name}_p{p}", None if mark is None else float(mark), "s")
            for p, mark in zip(PERCENTILES, marks, strict=True)
        ]
    tokens = sum(outcome.tokens for outcome in done)
    found.append(LoadFigure("output_tokens", tokens / span if span > 0 else 0.0, "tokens/s"))
    found.append(LoadFigure("requests", len(done) / span if span > 0 else 0.0, "1/s"))
    found.append(LoadFigure("failed", float(len(outcomes) - len(done)), "requests"))
    if objective is not None:
        good = sum(objective.met(outcome) for outcome in outcomes)
        found.append(LoadFigure("goodput", good / span if span > 0 else 0.0, "1/s"))
        found.append(LoadFigure("attainment", good / len(outcomes) if outcomes else 0.0, "of requests"))
    return found

"""Objectives that a whole run has to meet, such as ``ttft_p95=2,itl_p99=200ms,errors=0``. Arithmetic only."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from overfill.errors import InvalidRequest
from overfill.lab.traffic.outcome import Outcome, samples

LATENCIES = ("ttft", "itl", "tpot", "e2e")
"""``itl``: every gap between two tokens; ``tpot``: the mean gap of each answer."""

_NAME = re.compile(r"(ttft|itl|tpot|e2e|unattributed)_p(\d{1,2}(?:\.\d+)?|100)")
_VALUE = re.compile(r"(\d+(?:\.\d*)?|\.\d+)(ms|s|%)?")


@dataclass(frozen=True, slots=True)
class Limit:
    """One objective.

    Attributes:
        name: ``errors``, or a latency with its percentile.
        most: seconds for latencies, a share of 1 for ``unattributed`` and for ``errors`` with ``share``; otherwise a
            number of requests.
    """

    name: str
    most: float
    share: bool = False

    def measure(self, outcomes: Sequence[Outcome]) -> float | None:
        """The value of a run; None when no answer has one."""
        if self.name == "errors":
            failed = sum(not outcome.ok for outcome in outcomes)
            return failed / max(1, len(outcomes)) if self.share else float(failed)
        import numpy as np  # here, since the options of a load test are read without it

        latency, _, percentile = self.name.partition("_p")
        if latency == "tpot":
            values = [outcome.itl for outcome in outcomes if outcome.ok and outcome.tokens > 1]
        else:
            values = samples(outcomes, latency)
        return float(np.percentile(values, float(percentile))) if values else None

    def text(self, value: float | None) -> str:
        """``value`` with its unit."""
        if value is None:
            return "not measured"
        if self.share:
            return f"{100 * value:.2f} %"
        if self.name == "errors":
            return f"{value:.0f}"
        return f"{1e3 * value:.1f} ms" if value < 10 else f"{value:.2f} s"


@dataclass(frozen=True, slots=True)
class Verdict:
    """A limit held against a run. What was not measured is not met."""

    limit: Limit
    measured: float | None

    @property
    def met(self) -> bool:
        return self.measured is not None and self.measured <= self.limit.most

    def __str__(self) -> str:
        limit = self.limit
        return f"{limit.name}: {limit.text(self.measured)} (at most {limit.text(limit.most)})"


@dataclass(frozen=True, slots=True)
class Gate:
    """Every objective of a run. ``errors=0`` is one of them unless another number of errors is allowed."""

    limits: tuple[Limit, ...]

    @classmethod
    def parse(cls, text: str) -> Gate:
        """From ``NAME=VALUE,…``. Latencies are in seconds, or in ms when they say so; an empty text is ``errors=0``.

        Raises:
            InvalidRequest: a part is no objective, or is there twice.
        """
        limits: dict[str, Limit] = {}
        for part in filter(None, (part.strip() for part in text.split(","))):
            limit = _limit(part)
            if limit.name in limits:
                raise InvalidRequest("slo", f"has {limit.name} twice")
            limits[limit.name] = limit
        limits.setdefault("errors", Limit("errors", 0.0))
        return cls(tuple(limits.values()))

    def judge(self, outcomes: Sequence[Outcome]) -> list[Verdict]:
        """Every limit with what was measured."""
        return [Verdict(limit, limit.measure(outcomes)) for limit in self.limits]


def _limit(part: str) -> Limit:
    name, _, given = part.partition("=")
    value = _VALUE.fullmatch(given)
    if value is not None:
        number, unit = float(value[1]), value[2]
        if name == "errors" and unit == "%":
            return Limit(name, number / 100, share=True)
        if name == "errors" and unit is None and number == int(number):
            return Limit(name, number)
        if _NAME.fullmatch(name):
            if name.startswith("unattributed") and unit in (None, "%"):
                return Limit(name, number / 100 if unit else number, share=True)
            if not name.startswith("unattributed") and unit != "%" and number > 0:
                return Limit(name, number / 1e3 if unit == "ms" else number)
    raise InvalidRequest(
        "slo",
        f"{part!r} is no objective such as ttft_p95=2 (seconds), itl_p99=200ms, tpot_p50=0.1, e2e_p90=30, "
        "unattributed_p99=5%, errors=0 or errors=1%",
    )

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
class Threshold:
    """One objective.

    Attributes:
        name: ``errors``, or a latency with its percentile.
        most: seconds for latencies, a share of 1 for ``unattributed`` and for ``errors`` with ``share``; otherwise a
            number of requests.
    """

    name: str
    maximum: float
    is_fraction: bool = False

    def measure(self, outcomes: Sequence[Outcome]) -> float | None:
        """The value of a run; None when no answer has one."""
        if self.name == "errors":
            failed = sum(not outcome.ok for outcome in outcomes)
            return failed / max(1, len(outcomes)) if self.is_fraction else float(failed)
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
        if self.is_fraction:
            return f"{100 * value:.2f} %"
        if self.name == "errors":
            return f"{value:.0f}"
        return f"{1e3 * value:.1f} ms" if value < 10 else f"{value:.2f} s"


@dataclass(frozen=True, slots=True)
class Verdict:
    """A threshold held against a run. What was not measured is not met."""

    threshold: Threshold
    measured: float | None

    @property
    def met(self) -> bool:
        return self.measured is not None and self.measured <= self.threshold.maximum

    def __str__(self) -> str:
        threshold = self.threshold
        return f"{threshold.name}: {threshold.text(self.measured)} (at most {threshold.text(threshold.maximum)})"


@dataclass(frozen=True, slots=True)
class RunObjectives:
    """Every objective of a run. ``errors=0`` is one of them unless another number of errors is allowed."""

    thresholds: tuple[Threshold, ...]

    @classmethod
    def parse(cls, text: str) -> RunObjectives:
        """From ``NAME=VALUE,…``. Latencies are in seconds, or in ms when they say so; an empty text is ``errors=0``.

        Raises:
            InvalidRequest: a part is no objective, or is there twice.
        """
        thresholds: dict[str, Threshold] = {}
        for part in filter(None, (part.strip() for part in text.split(","))):
            threshold = _parse_threshold(part)
            if threshold.name in thresholds:
                raise InvalidRequest("slo", f"has {threshold.name} twice")
            thresholds[threshold.name] = threshold
        thresholds.setdefault("errors", Threshold("errors", 0.0))
        return cls(tuple(thresholds.values()))

    def judge(self, outcomes: Sequence[Outcome]) -> list[Verdict]:
        """Every threshold with what was measured."""
        return [Verdict(threshold, threshold.measure(outcomes)) for threshold in self.thresholds]


def _parse_threshold(part: str) -> Threshold:
    name, _, given = part.partition("=")
    value = _VALUE.fullmatch(given)
    if value is not None:
        number, unit = float(value[1]), value[2]
        if name == "errors" and unit == "%":
            return Threshold(name, number / 100, is_fraction=True)
        if name == "errors" and unit is None and number == int(number):
            return Threshold(name, number)
        if _NAME.fullmatch(name):
            if name.startswith("unattributed") and unit in (None, "%"):
                return Threshold(name, number / 100 if unit else number, is_fraction=True)
            if not name.startswith("unattributed") and unit != "%" and number > 0:
                return Threshold(name, number / 1e3 if unit == "ms" else number)
    raise InvalidRequest(
        "slo",
        f"{part!r} is no objective such as ttft_p95=2 (seconds), itl_p99=200ms, tpot_p50=0.1, e2e_p90=30, "
        "unattributed_p99=5%, errors=0 or errors=1%",
    )

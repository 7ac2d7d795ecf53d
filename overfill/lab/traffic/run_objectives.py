"""Objectives of a whole run, such as ``ttft_p95=2,itl_p99=200ms,errors=0``: parsing and checking. No I/O."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from overfill.errors import InvalidRequest
from overfill.lab.traffic.outcome import Objective, Outcome, samples

_NAME = re.compile(r"(ttft|itl|tpot|e2e|unattributed)_p(\d{1,2}(?:\.\d+)?|100)")
_VALUE = re.compile(r"(\d+(?:\.\d*)?|\.\d+)(ms|s|%)?")


@dataclass(frozen=True, slots=True)
class Threshold:
    """Maximum of one measured value.

    Attributes:
        name: ``errors``, or a latency or ``unattributed`` with its percentile, such as ``ttft_p95``.
        maximum: Seconds for latencies, a fraction if ``is_fraction`` is set, else a number of failed requests.
        is_fraction: True for ``unattributed``, and for ``errors`` given in percent.
    """

    name: str
    maximum: float
    is_fraction: bool = False

    def measure(self, outcomes: Sequence[Outcome]) -> float | None:
        """Returns the value for a run. None means that no answer has this value."""
        if self.name == "errors":
            failed = sum(not outcome.ok for outcome in outcomes)
            return failed / max(1, len(outcomes)) if self.is_fraction else float(failed)
        import numpy as np  # imported here: parsing a load test's options must not need it

        latency, _, percentile = self.name.partition("_p")
        if latency == "tpot":
            values = [outcome.itl for outcome in outcomes if outcome.ok and outcome.tokens > 1]
        else:
            values = samples(outcomes, latency)
        return float(np.percentile(values, float(percentile))) if values else None

    def text(self, value: float | None) -> str:
        """Formats ``value`` with its unit."""
        if value is None:
            return "not measured"
        if self.is_fraction:
            return f"{100 * value:.2f} %"
        if self.name == "errors":
            return f"{value:.0f}"
        return f"{1e3 * value:.1f} ms" if value < 10 else f"{value:.2f} s"


@dataclass(frozen=True, slots=True)
class ObjectiveVerdict:
    """Result of checking one threshold. A value that was not measured does not meet it."""

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
    """All objectives of a run. They include ``errors=0`` unless the text allows another number of errors."""

    thresholds: tuple[Threshold, ...]

    @classmethod
    def parse(cls, text: str) -> RunObjectives:
        """Parses ``NAME=VALUE,…``. Latencies are in seconds, or in milliseconds with the unit ``ms``.

        Raises:
            InvalidRequest: A part is not an objective, or is given twice.
        """
        thresholds: dict[str, Threshold] = {}
        for part in filter(None, (part.strip() for part in text.split(","))):
            threshold = _parse_threshold(part)
            if threshold.name in thresholds:
                raise InvalidRequest("objective", f"gives {threshold.name} twice")
            thresholds[threshold.name] = threshold
        thresholds.setdefault("errors", Threshold("errors", 0.0))
        return cls(tuple(thresholds.values()))

    def of_each_request(self) -> Objective:
        """Returns the limits as those of a single request; of several percentiles, the largest limit counts.

        A single request has no percentiles of gaps, so limits of ``itl`` and ``tpot`` apply to its mean gap.
        """
        limits: dict[str, float] = {}
        for threshold in self.thresholds:
            name = threshold.name.partition("_p")[0].replace("tpot", "itl")
            if name in Objective.__slots__:
                limits[name] = max(threshold.maximum, limits.get(name, 0.0))
        return Objective(**limits)

    def judge(self, outcomes: Sequence[Outcome]) -> list[ObjectiveVerdict]:
        """Checks every threshold against the outcomes of a run."""
        return [ObjectiveVerdict(threshold, threshold.measure(outcomes)) for threshold in self.thresholds]


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
        "objective",
        f"{part!r} is not an objective such as ttft_p95=2 (seconds), itl_p99=200ms, tpot_p50=0.1, e2e_p90=30, "
        "unattributed_p99=5%, errors=0 or errors=1%",
    )

"""Objectives of a whole run, such as ``ttft_p95=2,itl_p99=200ms,errors=0``: parsing and checking. No I/O.

An objective is a ``Measurement`` whose bound is the largest allowed value. Its value is NaN until a run is judged. Its
unit is s, %, or none for a number of errors.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import replace

from overfill.errors import InvalidRequest
from overfill.lab.measurement import Measurement
from overfill.lab.traffic.outcome import Objective, Outcome, parse_seconds, samples

_PERCENTILE = r"_p(\d{1,2}(?:\.\d+)?|100)"
_NUMBER = re.compile(r"(\d+(?:\.\d*)?|\.\d+)(%)?")


def parse_objectives(text: str) -> list[Measurement]:
    """Parses ``NAME=VALUE,…``. Latencies are in seconds, or in milliseconds with the unit ``ms``.

    The objectives include ``errors=0`` unless the text allows another number of errors.

    Raises:
        InvalidRequest: A part is not an objective, or is given twice.
    """
    objectives: dict[str, Measurement] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        objective = _parse(part)
        if objective.name in objectives:
            raise InvalidRequest("objective", f"gives {objective.name} twice")
        objectives[objective.name] = objective
    objectives.setdefault("errors", Measurement("errors", math.nan, "", bound=0.0))
    return list(objectives.values())


def judge(objectives: Sequence[Measurement], outcomes: Sequence[Outcome]) -> list[Measurement]:
    """Measures every objective of a run. One that no answer has a value for stays NaN, and is not reached."""
    return [replace(objective, value=_measure(objective, outcomes)) for objective in objectives]


def of_each_request(objectives: Sequence[Measurement]) -> Objective:
    """Returns the limits as those of a single request; of several percentiles, the largest limit counts.

    A single request has no percentiles of gaps, so limits of ``itl`` and ``tpot`` apply to its mean gap.
    """
    limits: dict[str, float] = {}
    for objective in objectives:
        name = objective.name.partition("_p")[0].replace("tpot", "itl")
        if name in Objective.__slots__ and objective.bound is not None:
            limits[name] = max(objective.bound, limits.get(name, 0.0))
    return Objective(**limits)


def _measure(objective: Measurement, outcomes: Sequence[Outcome]) -> float:
    if objective.name == "errors":
        failed = sum(not outcome.ok for outcome in outcomes)
        return 100 * failed / max(1, len(outcomes)) if objective.unit == "%" else float(failed)
    import numpy as np  # imported here: parsing a load test's options must not need it

    name, _, percentile = objective.name.partition("_p")
    values = samples(outcomes, name.replace("tpot", "request_itl"))
    factor = 100 if objective.unit == "%" else 1
    return factor * float(np.percentile(values, float(percentile))) if values else math.nan


def _parse(part: str) -> Measurement:
    name, _, given = part.partition("=")
    if re.fullmatch(rf"(ttft|itl|tpot|e2e){_PERCENTILE}", name) and (limit := parse_seconds(given)) > 0:
        return Measurement(name, math.nan, "s", bound=limit)
    if value := _NUMBER.fullmatch(given):
        number, percent = float(value[1]), value[2] or ""
        if name == "errors" and (percent or number == int(number)):
            return Measurement(name, math.nan, percent, bound=number)
        if re.fullmatch(rf"unattributed{_PERCENTILE}", name):
            return Measurement(name, math.nan, "%", bound=number if percent else 100 * number)
    raise InvalidRequest(
        "objective",
        f"{part!r} is not an objective such as ttft_p95=2 (seconds), itl_p99=200ms, tpot_p50=0.1, e2e_p90=30, "
        "unattributed_p99=5%, errors=0 or errors=1%",
    )

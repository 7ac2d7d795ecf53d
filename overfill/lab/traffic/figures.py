"""Figures of many outcomes: latencies with percentiles, rates, and the share that meets an objective. No I/O."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from overfill.lab.measurement import Measurement
from overfill.lab.traffic.outcome import Objective, Outcome, samples


@dataclass(frozen=True, slots=True)
class Figure(Measurement):
    """A figure of a run. Of a latency, ``value`` is the median, and the percentiles are beside it."""

    p90: float | None = None
    p95: float | None = None
    p99: float | None = None

    @classmethod
    def latency(cls, name: str, percentile: Callable[[float], Any], unit: str = "s", **more: Any) -> Figure:
        """Makes the figure of a latency, given the function that returns its percentiles."""
        value, p90, p95, p99 = (float(percentile(mark)) for mark in (50, 90, 95, 99))
        return cls(name, value, unit, p90=p90, p95=p95, p99=p99, **more)


def latencies(outcomes: Sequence[Outcome], names: Sequence[str] = ("ttft", "itl", "e2e"), **more: Any) -> list[Figure]:
    """Returns the figures of ``samples`` by these names. One that no answer has a value for is left out.

    Args:
        more: arguments of every ``Figure``.
    """
    found = ((name, samples(outcomes, name)) for name in names)
    return [Figure.latency(name, partial(np.percentile, values), **more) for name, values in found if values]


def figures(outcomes: Sequence[Outcome], objective: Objective | None = None) -> list[Figure]:
    """Returns the figures of a run.

    With an objective, ``goodput`` are the answers per second that meet it, and ``attainment`` is their share of all
    requests.
    """
    done = [outcome for outcome in outcomes if outcome.ok]
    span = max((outcome.times[-1] for outcome in done), default=0.0) - min((o.due for o in outcomes), default=0.0)

    def per_second(count: int) -> float:
        return count / span if span > 0 else 0.0

    rows = [
        *latencies(done),
        *latencies(done, ["unattributed"], unit="of TTFT"),
        Figure("request_rate", per_second(len(done)), "1/s"),
        Figure("output_tokens", per_second(sum(outcome.tokens for outcome in done)), "tokens/s"),
        Figure("requests", len(outcomes), "requests"),
        Figure("failed", len(outcomes) - len(done), "requests"),
    ]
    if objective is not None:
        good = sum(map(objective.met, outcomes))
        rows.append(Figure("goodput", per_second(good), "1/s"))
        rows.append(Figure("attainment", good / max(1, len(outcomes)), "of requests"))
    return rows

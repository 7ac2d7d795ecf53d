"""Measuring several contenders side by side: in turns, so that what disturbs the machine disturbs all of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median, quantiles

from overfill.lab.bench.contender import Contender
from overfill.lab.bench.machine import Machine, typical

_PAUSE = 0.25
"""Seconds before a turn: thread pools spin for a while when their work is done, which would disturb the next."""


@dataclass(frozen=True, slots=True)
class Sample:
    """Seconds that the same thing took, again and again."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return median(self.seconds)

    @property
    def spread(self) -> float:
        """Distance of the first and the third quartile, as a share of the median."""
        if len(self.seconds) < 2:
            return 0.0
        low, _, high = quantiles(self.seconds, n=4, method="inclusive")
        return (high - low) / self.median


@dataclass(frozen=True, slots=True)
class Plan:
    """How often something is measured.

    Attributes:
        rounds: turns of each contender.
        steps: decode steps in a turn.
        warmup: decode steps before the first turn.
    """

    rounds: int = 5
    steps: int = 16
    warmup: int = 4

    @property
    def total_steps(self) -> int:
        return self.warmup + self.rounds * self.steps


def in_turns(
    plan: Plan,
    contenders: Sequence[Contender],
    turn: Callable[[Contender], Sequence[float]],
    probe: Callable[[], Machine],
) -> tuple[dict[str, Sample], Machine]:
    """Every contender's turn once a round, and the machine's; seconds by contender, and what the machine did."""
    seconds: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    machines = []
    for _ in range(plan.rounds):
        time.sleep(_PAUSE)
        machines.append(probe())
        for contender in contenders:
            time.sleep(_PAUSE)
            seconds[contender.name] += turn(contender)
    return {name: Sample(tuple(times)) for name, times in seconds.items()}, typical(machines)

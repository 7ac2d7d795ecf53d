"""Measures several engines in turns within one run, so that a disturbance of the machine affects all of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median, quantiles

from overfill.lab.bench.engine.machine import Machine, median_machine
from overfill.lab.bench.engine.protocol import BenchEngine

_PAUSE = 0.25
"""Seconds of pause before a turn. Threads of a pool spin for a while after their work, and would slow the next turn."""


@dataclass(frozen=True, slots=True)
class Timings:
    """Repeated timings of the same work, in seconds."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return median(self.seconds)

    @property
    def relative_iqr(self) -> float:
        """Interquartile range divided by the median; 0 for a single timing."""
        if len(self.seconds) < 2:
            return 0.0
        low, _, high = quantiles(self.seconds, n=4, method="inclusive")
        return (high - low) / self.median


@dataclass(frozen=True, slots=True)
class BenchPlan:
    """The number of turns and decode steps.

    Attributes:
        rounds: Turns of each engine.
        steps: Decode steps in a turn.
        warmup: Decode steps before the first turn.
    """

    rounds: int = 5
    steps: int = 16
    warmup: int = 4

    @property
    def total_steps(self) -> int:
        return self.warmup + self.rounds * self.steps


def in_turns(
    plan: BenchPlan,
    engines: Sequence[BenchEngine],
    turn: Callable[[BenchEngine], Sequence[float]],
    probe: Callable[[], Machine],
) -> tuple[dict[str, Timings], Machine]:
    """Runs ``probe`` and a turn of every engine in each round.

    Returns:
        Timings by engine name, and the median of what ``probe`` measured.
    """
    seconds: dict[str, list[float]] = {engine.name: [] for engine in engines}
    machines = []
    for _ in range(plan.rounds):
        time.sleep(_PAUSE)
        machines.append(probe())
        for engine in engines:
            time.sleep(_PAUSE)
            seconds[engine.name] += turn(engine)
    return {name: Timings(tuple(times)) for name, times in seconds.items()}, median_machine(machines)

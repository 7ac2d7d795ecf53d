"""Finds the rate of arrivals at which a server is just saturated. Arithmetic only; whoever asks plays the loads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

FEWEST = 0.9
"""Share of requests that meet the objective, below which a server counts as saturated."""

STEP = 1.15
"""Factor between one rate and the next."""

MOST_STEPS = 8


@dataclass(frozen=True, slots=True)
class Step:
    """What came of one rate: ``attainment`` is the share of its requests that met the objective."""

    rate: float
    attainment: float

    @property
    def saturated(self) -> bool:
        return self.attainment < FEWEST

    def __str__(self) -> str:
        return f"{self.rate:.2f} requests per second: {100 * self.attainment:.0f} % met the objective"


def find_saturation(first: float, attainment: Callable[[float], float], note: Callable[[Step], object]) -> Step:
    """Steps from ``first`` up, or down when that is too much already, until the lowest saturating rate is known.

    The share of requests that meet the objective stands for goodput by offered rate: goodput counts the time in which
    the last answers are finished too, and would fall short of the offer of a short load whatever the server does.

    Args:
        first: requests per second to begin with, best what the server answers when all come at once.
        attainment: plays the load at a rate.
        note: told of each step.

    Returns:
        The lowest rate seen that saturates; where ``MOST_STEPS`` did not, the highest, which is not ``saturated``.
    """

    def take(rate: float) -> Step:
        step = Step(rate, attainment(rate))
        note(step)
        return step

    step = take(first)
    down = step.saturated
    for _ in range(MOST_STEPS - 1):
        before, step = step, take(step.rate / STEP if down else step.rate * STEP)
        if step.saturated != down:
            return before if down else step
    return step

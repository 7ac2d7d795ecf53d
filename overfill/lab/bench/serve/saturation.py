"""Finds the rate of arrivals at which a server is just saturated. Arithmetic only; the caller plays the loads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

MIN_ATTAINMENT = 0.9
"""A server is saturated if a smaller share of its requests meets the objective."""

RATE_FACTOR = 1.15
"""Factor between one rate and the next."""

MAX_STEPS = 8
"""Maximum number of rates that are tried."""


@dataclass(frozen=True, slots=True)
class RateStep:
    """One rate that was tried, and the share of its requests that met the objective (``attainment``)."""

    rate: float
    attainment: float

    @property
    def saturated(self) -> bool:
        return self.attainment < MIN_ATTAINMENT

    def __str__(self) -> str:
        return f"{self.rate:.2f} requests per second: {100 * self.attainment:.0f} % met the objective"


def find_saturation(
    first: float, attainment: Callable[[float], float], on_step: Callable[[RateStep], object]
) -> RateStep:
    """Tries rates upwards from ``first``, or downwards if it saturates, until the lowest saturating rate is known.

    The function judges a rate by the share of requests that meet the objective, not by goodput / offered rate. Goodput
    also divides by the time to finish the last answers. So in a short run it is below the offered rate for any server.

    Args:
        first: Requests per second of the first step; best the server's throughput when all requests arrive at once.
        attainment: Plays the load at a rate; returns the share of requests that met the objective.
        on_step: Called after each step.

    Returns:
        The lowest saturating rate that was tried. If none saturated within ``MAX_STEPS``, the highest rate.
    """

    def try_rate(rate: float) -> RateStep:
        step = RateStep(rate, attainment(rate))
        on_step(step)
        return step

    step = try_rate(first)
    down = step.saturated
    for _ in range(MAX_STEPS - 1):
        before, step = step, try_rate(step.rate / RATE_FACTOR if down else step.rate * RATE_FACTOR)
        if step.saturated != down:
            return before if down else step
    return step

"""How many users there are at a moment of a test. Arithmetic only."""

from __future__ import annotations

from typing import Literal, get_args

Shape = Literal["arrivals", "constant", "ramp", "spike", "soak"]

SHAPES: tuple[Shape, ...] = get_args(Shape)
"""``arrivals``: requests are sent when they are due, whatever becomes of earlier ones. In all others users ask again
as soon as they have an answer: ``constant`` as many all along; ``ramp`` from one to all; ``spike`` a tenth of them, and
all in the middle fifth; ``soak`` all of them, for an hour unless told otherwise."""

DURATIONS: dict[Shape, float] = {"constant": 60.0, "ramp": 120.0, "spike": 120.0, "soak": 3600.0}
"""Seconds, where none are given."""


def users_at(shape: Shape, elapsed: float, duration: float, max_users: int) -> int | None:
    """Users ``elapsed`` seconds after the start; None when the test is over."""
    if elapsed >= duration:
        return None
    if shape == "ramp":
        # Whole users, each for an equal part of the time, and all of them for the last part.
        return min(max_users, 1 + int(elapsed / duration * max_users))
    if shape == "spike":
        return max_users if 0.4 <= elapsed / duration < 0.6 else max(1, round(max_users / 10))
    return max_users

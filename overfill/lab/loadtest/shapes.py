"""Shapes of load: the number of users at each moment of a test. No I/O."""

from __future__ import annotations

from typing import Literal, get_args

Shape = Literal["arrivals", "constant", "ramp", "spike", "soak"]

SHAPES: tuple[Shape, ...] = get_args(Shape)
"""With ``arrivals``, each request is sent at its own time (open loop). With the others, each user sends the next
request after an answer (closed loop):

* ``constant``: all users all the time;
* ``ramp``: from one user to all;
* ``spike``: a tenth of the users, and all of them in the middle fifth;
* ``soak``: all users, for an hour by default.
"""

DURATIONS: dict[Shape, float] = {"constant": 60.0, "ramp": 120.0, "spike": 120.0, "soak": 3600.0}
"""Default duration in seconds."""


def users_at(shape: Shape, elapsed: float, duration: float, max_users: int) -> int | None:
    """Returns the number of users ``elapsed`` seconds after the start. None means that the test is over."""
    if elapsed >= duration:
        return None
    if shape == "ramp":
        # Steps of equal length, one user more in each; the last step has all users.
        return min(max_users, 1 + int(elapsed / duration * max_users))
    if shape == "spike":
        return max_users if 0.4 <= elapsed / duration < 0.6 else max(1, round(max_users / 10))
    return max_users

"""Priorities of requests: classes with a queue each; smaller numbers go first."""

from __future__ import annotations

from overfill.errors import InvalidRequest

MAX_PRIORITY = 2
"""Priorities range from -2 to 2; 0 is the default."""


def check_priority(priority: int) -> None:
    """Raise InvalidRequest if ``priority`` is not an integer in range."""
    if not isinstance(priority, int) or not -MAX_PRIORITY <= priority <= MAX_PRIORITY:
        raise InvalidRequest("priority", f"must be an integer from {-MAX_PRIORITY} to {MAX_PRIORITY}, got {priority!r}")

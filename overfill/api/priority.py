"""Priorities of requests: a few classes, each with a queue of its own; the smaller number goes first."""

from __future__ import annotations

from overfill.errors import InvalidRequest

MAX_PRIORITY = 2
"""They go from -2 to 2; 0 is usual."""


def check_priority(priority: int) -> None:
    """Raises InvalidRequest."""
    if not isinstance(priority, int) or not -MAX_PRIORITY <= priority <= MAX_PRIORITY:
        raise InvalidRequest("priority", f"must be from {-MAX_PRIORITY} to {MAX_PRIORITY}, got {priority!r}")

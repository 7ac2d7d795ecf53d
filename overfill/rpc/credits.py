"""Divides a worker's request slots among the routers that it has joined. Pure arithmetic."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class RouterDemand:
    """Load that a router last reported to the worker.

    Attributes:
        in_use: number of this router's requests on the worker.
        queued: number of requests waiting in the router.
    """

    in_use: int
    queued: int


def divide(capacity: int, demands: Sequence[RouterDemand | None]) -> list[int]:
    """Returns the credits of each router: the maximum number of requests it may have on the worker at once.

    A router keeps credits for its running requests; one without a report (None) gets an equal share. Unused credits are
    handed out one at a time, each to the router with the fewest credits. First, each router without a queue gets one,
    so that it can start a request without asking. Routers with queued requests come next, then all that have reported.

    Every router gets at least one credit, even if the worker has fewer slots than there are routers; otherwise a router
    could wait for ever. With capacity 0, all credits are 0.
    """
    if not capacity or not demands:
        return [0] * len(demands)
    equal = capacity // len(demands)
    credits = [equal if demand is None else min(demand.in_use, capacity) for demand in demands]
    free = max(0, capacity - sum(credits))
    for index in sorted(range(len(demands)), key=lambda i: credits[i]):
        demand = demands[index]
        if free and demand is not None and not demand.queued:
            credits[index] += 1
            free -= 1
    wanted = [0 if d is None else max(0, d.in_use + d.queued - c) for d, c in zip(demands, credits, strict=True)]
    free = _hand_out(credits, wanted, free)
    _hand_out(credits, [0 if demand is None else free for demand in demands], free)
    return [max(1, credit) for credit in credits]


def _hand_out(credits: list[int], wanted: list[int], free: int) -> int:
    """Hands out ``free`` credits, each to the router with the fewest that still wants one; returns the rest."""
    while free and any(wanted):
        index = min((i for i, want in enumerate(wanted) if want), key=lambda i: credits[i])
        credits[index] += 1
        wanted[index] -= 1
        free -= 1
    return free

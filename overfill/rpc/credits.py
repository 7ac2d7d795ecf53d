"""How a worker divides the requests that it takes at once among the routers that it has joined. Pure arithmetic."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class RouterDemand:
    """What a router has said.

    Attributes:
        in_use: requests that it has on the worker.
        queued: requests that wait in it.
    """

    in_use: int
    queued: int


def divide(capacity: int, demands: Sequence[RouterDemand | None]) -> list[int]:
    """Credits of each router: most requests that it may have on the worker at once.

    What is not in use goes first to routers with requests waiting, one by one to the one that would have least, then
    in the same way to all, so that a router has something to begin with. A router that has said nothing (None) gets an
    equal share. No router is given room that another one's requests fill; each may always have one request, lest it
    wait for ever on a worker smaller than the number of routers. Of a capacity of nothing everybody gets nothing.
    """
    if not capacity or not demands:
        return [0] * len(demands)
    equal = capacity // len(demands)
    credits = [equal if demand is None else min(demand.in_use, capacity) for demand in demands]
    free = max(0, capacity - sum(credits))
    # Routers without a queue keep one to begin with, so that they need not ask first.
    for index in sorted(range(len(demands)), key=lambda i: credits[i]):
        demand = demands[index]
        if free and demand is not None and not demand.queued:
            credits[index] += 1
            free -= 1
    wanted = [0 if d is None else max(0, d.in_use + d.queued - c) for d, c in zip(demands, credits, strict=True)]
    free = _pour(credits, wanted, free)
    _pour(credits, [0 if demand is None else free for demand in demands], free)
    return [max(1, credit) for credit in credits]


def _pour(credits: list[int], wanted: list[int], free: int) -> int:
    """Gives ``free`` credits, each to the one with fewest that wants more; returns what nobody wants."""
    while free and any(wanted):
        index = min((i for i, want in enumerate(wanted) if want), key=lambda i: credits[i])
        credits[index] += 1
        wanted[index] -= 1
        free -= 1
    return free

"""Searches how many workers of each kind a trace needs to meet an objective, by simulating runs.

We assume that more workers never make a run worse. The smallest sizes then form a staircase: fewer prefill workers need
more decode workers. The search finds both ends by bisection and walks from one to the other.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

from overfill.errors import OverfillError
from overfill.lab.measurement import Measurement
from overfill.lab.simulate.options import SimulationOptions
from overfill.lab.simulate.profiles import Profile
from overfill.lab.simulate.result import SimulationResult
from overfill.lab.simulate.stack import Simulation
from overfill.lab.traffic.traces import TraceRequest

MAX_WORKERS = 256
"""Maximum workers of one kind to try."""


@dataclass(frozen=True, slots=True)
class Size(Measurement):
    """Sizes of both pools that meet the objective, and miss it with one worker less of either kind.

    ``value`` is the cost of the workers. The other figures are of the run with these sizes.
    """

    prefill: int = 0
    decode: int = 0
    attainment: float = 0.0
    ttft_p99: float | None = None
    request_itl_p99: float | None = None
    prefill_utilisation: float | None = None
    decode_utilisation: float | None = None


SIZE_COLUMNS = {
    "met": "attainment",
    "TTFT p99": "ttft_p99",
    "request ITL p99": "request_itl_p99",
    "prefill busy": "prefill_utilisation",
    "decode busy": "decode_utilisation",
}
"""Columns of a table of sizes, and what they show."""


def smallest_sizes(
    trace: Sequence[TraceRequest],
    profile: Profile,
    options: SimulationOptions,
    attainment: float,
    costs: Sequence[float] = (1.0, 1.0),
    report: Callable[[str, int, int], object] = lambda what, done, total: None,
) -> list[Size]:
    """Returns the smallest sizes of both pools, the cheapest first.

    Args:
        attainment: Share of requests that must meet the objective of ``options``.
        costs: Costs of one prefill and one decode worker, in any unit.
        report: Called after each run with what was tried, and the numbers of runs and of those expected.

    Raises:
        OverfillError: Even ``MAX_WORKERS`` workers of each kind miss the objective.
    """
    max_misses = int((1 - attainment) * len(trace) + 1e-9)

    @cache
    def met(prefill: int, decode: int) -> SimulationResult | None:
        """Returns the result of a run with these sizes; None if it misses the objective."""
        sized = replace(options, prefill=prefill, decode=decode)
        result = Simulation(trace, profile, sized).run(max_misses=max_misses)
        runs = met.cache_info().misses
        report(f"Tried {_words(prefill, decode)}", runs, runs + 1)
        return result if result.attainment >= attainment else None

    workers = 1
    while met(workers, workers) is None:
        if workers >= MAX_WORKERS:
            raise OverfillError(
                f"{options.objective} is not met by {attainment:.0%} of the requests with {workers} workers of "
                "each kind; some requests may take longer than that on an idle worker",
            )
        workers *= 2
    # With twice as many workers of the other kind, only the searched kind limits the run.
    decode = ample = 2 * workers
    fewest_prefill = _smallest(1, workers, lambda n: met(n, ample))
    fewest_decode = _smallest(1, workers, lambda m: met(ample, m))
    sizes: list[Size] = []
    for prefill in range(fewest_prefill, ample + 1):
        least = _smallest(fewest_decode, decode, partial(met, prefill))
        if sizes and least == decode:
            continue  # one more prefill worker saves no decode worker
        decode = least
        result = met(prefill, decode)
        assert result is not None
        figures: dict[str, Any] = {name: result.figures.get(name) for name in SIZE_COLUMNS.values()}
        cost = prefill * costs[0] + decode * costs[1]
        sizes.append(Size(_words(prefill, decode), cost, "cost", prefill=prefill, decode=decode, **figures))
        if decode == fewest_decode:
            break
    return sorted(sizes, key=lambda size: size.value)


def _words(prefill: int, decode: int) -> str:
    return f"{prefill} prefill + {decode} decode"


def _smallest(low: int, high: int, met: Callable[[int], object]) -> int:
    """Returns the smallest number from ``low`` to ``high`` that meets the objective. ``high`` must meet it."""
    return low + bisect_left(range(low, high), True, key=lambda number: met(number) is not None)

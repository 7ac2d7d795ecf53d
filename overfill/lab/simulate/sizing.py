"""Searches how many workers of each kind a trace needs to meet an objective, by simulating runs.

We assume that more workers never make a run worse. The smallest sizes then form a staircase: fewer prefill workers need
more decode workers. The search finds both ends by bisection and walks from one to the other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from overfill.errors import OverfillError
from overfill.lab.simulate.options import SimulationOptions
from overfill.lab.simulate.profiles import Profile
from overfill.lab.simulate.result import SimulationResult
from overfill.lab.simulate.stack import Simulation
from overfill.lab.traffic.outcome import Objective
from overfill.lab.traffic.traces import TraceRequest


@dataclass(frozen=True, slots=True)
class Size:
    """Sizes of both pools that meet the objective, and miss it with one worker less of either kind."""

    prefill: int
    decode: int
    cost: float
    result: SimulationResult


class SizeSearch:
    """Searches the smallest sizes of both pools.

    Args:
        attainment: Share of requests that must meet ``objective``.
        costs: Costs of one prefill and one decode worker, in any unit.
        max_workers: Maximum workers of one kind to try.
        on_run: Called after each run with (prefill, decode, objective met).
    """

    def __init__(
        self,
        trace: Sequence[TraceRequest],
        profile: Profile,
        options: SimulationOptions,
        objective: Objective,
        attainment: float,
        costs: tuple[float, float] = (1.0, 1.0),
        max_workers: int = 256,
        on_run: Callable[[int, int, bool], None] = lambda prefill, decode, met: None,
    ) -> None:
        self._trace, self._profile, self._costs, self._max_workers = trace, profile, costs, max_workers
        self._objective, self._attainment = objective, attainment
        allowed = int((1 - attainment) * len(trace) + 1e-9)
        self._options = replace(options, scaling=None, objective=objective, max_misses=allowed)
        self._on_run = on_run
        self._met: dict[tuple[int, int], SimulationResult | None] = {}

    @property
    def runs(self) -> int:
        return len(self._met)

    def frontier(self) -> list[Size]:
        """Returns the smallest sizes, fewest prefill workers first.

        Raises:
            OverfillError: Even ``max_workers`` workers of each kind miss the objective.
        """
        workers = 1
        while self._try(workers, workers) is None:
            if workers >= self._max_workers:
                raise OverfillError(
                    f"{self._objective} is not met by {self._attainment:.0%} of the requests with {workers} workers "
                    "of each kind; some requests may take longer than that on an idle worker",
                )
            workers = min(self._max_workers, 2 * workers)
        # With twice as many workers of the other kind, only the searched kind limits the run.
        ample = 2 * workers
        fewest_prefill = _smallest(1, workers, lambda n: self._try(n, ample) is not None)
        fewest_decode = _smallest(1, workers, lambda m: self._try(ample, m) is not None)
        sizes: list[Size] = []
        decode = ample
        for prefill in range(fewest_prefill, ample + 1):
            least = _smallest(fewest_decode, decode, lambda m, n=prefill: self._try(n, m) is not None)  # type: ignore[misc]
            if sizes and least == decode:
                continue  # one more prefill worker saves no decode worker
            result = self._try(prefill, least)
            assert result is not None
            decode = least
            cost = prefill * self._costs[0] + least * self._costs[1]
            sizes.append(Size(prefill, least, cost, result))
            if decode == fewest_decode:
                break
        return sizes

    def _try(self, prefill: int, decode: int) -> SimulationResult | None:
        """Simulates these sizes once. Returns the result if it meets the objective, else None."""
        if (prefill, decode) not in self._met:
            options = replace(self._options, prefill=prefill, decode=decode)
            result = Simulation(self._trace, self._profile, options).run()
            met = result.attainment(self._objective) >= self._attainment
            self._on_run(prefill, decode, met)
            self._met[prefill, decode] = result if met else None
        return self._met[prefill, decode]


def _smallest(low: int, high: int, enough: Callable[[int], bool]) -> int:
    """Returns the smallest number from ``low`` to ``high`` that is enough. ``high`` must be enough."""
    while low < high:
        middle = (low + high) // 2
        if enough(middle):
            high = middle
        else:
            low = middle + 1
    return low

"""Searches how many workers of each kind a trace needs to meet an objective, by simulating runs.

We assume that more workers never make a run worse. The smallest sizes then form a staircase: fewer prefill workers need
more decode workers. The search finds both ends by bisection and walks from one to the other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from overfill.errors import OverfillError
from overfill.lab.measurement import Measurement
from overfill.lab.simulate.options import SimulationOptions
from overfill.lab.simulate.profiles import Profile
from overfill.lab.simulate.result import SimulationResult
from overfill.lab.simulate.stack import Simulation
from overfill.lab.traffic.traces import TraceRequest


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


COLUMNS = {
    "met": "attainment",
    "TTFT p99": "ttft_p99",
    "ITL p99": "request_itl_p99",
    "prefill busy": "prefill_utilisation",
    "decode busy": "decode_utilisation",
}
"""Columns of a table of sizes, and what they show."""


class SizeSearch:
    """Searches the smallest sizes of both pools.

    Args:
        attainment: Share of requests that must meet the objective of ``options``.
        costs: Costs of one prefill and one decode worker, in any unit.
        max_workers: Maximum workers of one kind to try.
        on_run: Called after each run with its sizes in words, and the number of runs.
    """

    def __init__(
        self,
        trace: Sequence[TraceRequest],
        profile: Profile,
        options: SimulationOptions,
        attainment: float,
        costs: Sequence[float] = (1.0, 1.0),
        max_workers: int = 256,
        on_run: Callable[[str, int], None] = lambda sizes, runs: None,
    ) -> None:
        self._trace, self._profile, self._costs, self._max_workers = trace, profile, costs, max_workers
        self._attainment = attainment
        self._options = replace(options, max_misses=int((1 - attainment) * len(trace) + 1e-9))
        self._on_run = on_run
        self._met: dict[tuple[int, int], SimulationResult | None] = {}

    def frontier(self) -> list[Size]:
        """Returns the smallest sizes, the cheapest first.

        Raises:
            OverfillError: Even ``max_workers`` workers of each kind miss the objective.
        """
        workers = 1
        while not self._meets(workers, workers):
            if workers >= self._max_workers:
                raise OverfillError(
                    f"{self._options.objective} is not met by {self._attainment:.0%} of the requests with {workers} "
                    "workers of each kind; some requests may take longer than that on an idle worker",
                )
            workers = min(self._max_workers, 2 * workers)
        # With twice as many workers of the other kind, only the searched kind limits the run.
        ample = 2 * workers
        fewest_prefill = _smallest(1, workers, lambda n: self._meets(n, ample))
        fewest_decode = _smallest(1, workers, lambda m: self._meets(ample, m))
        sizes: list[Size] = []
        decode = ample
        for prefill in range(fewest_prefill, ample + 1):
            least = _smallest(fewest_decode, decode, partial(self._meets, prefill))
            if sizes and least == decode:
                continue  # one more prefill worker saves no decode worker
            decode = least
            sizes.append(self._size(prefill, decode))
            if decode == fewest_decode:
                break
        return sorted(sizes, key=lambda size: size.value)

    def _meets(self, prefill: int, decode: int) -> bool:
        """Simulates these sizes once. Returns True if the run meets the objective."""
        if (prefill, decode) not in self._met:
            options = replace(self._options, prefill=prefill, decode=decode)
            result = Simulation(self._trace, self._profile, options).run()
            self._met[prefill, decode] = result if result.attainment >= self._attainment else None
            self._on_run(_words(prefill, decode), len(self._met))
        return self._met[prefill, decode] is not None

    def _size(self, prefill: int, decode: int) -> Size:
        result = self._met[prefill, decode]
        assert result is not None
        figures = {name: result.figures.get(name) for name in COLUMNS.values()}
        cost = prefill * self._costs[0] + decode * self._costs[1]
        return Size(_words(prefill, decode), cost, "cost", prefill=prefill, decode=decode, **figures)  # type: ignore[arg-type]


def _words(prefill: int, decode: int) -> str:
    return f"{prefill} prefill + {decode} decode"


def _smallest(low: int, high: int, enough: Callable[[int], bool]) -> int:
    """Returns the smallest number from ``low`` to ``high`` that is enough. ``high`` must be enough."""
    while low < high:
        middle = (low + high) // 2
        if enough(middle):
            high = middle
        else:
            low = middle + 1
    return low

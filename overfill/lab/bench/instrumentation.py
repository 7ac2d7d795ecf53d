"""What counting costs: decode steps with metrics and without, in turns.

With metrics, a step is counted as a decode worker counts it, and each of its tokens as a router does: all in this one
process, though a router counts in another. A scrape of both is timed in every turn, and counts for as much of it as
there would be at one in ``SCRAPE_INTERVAL`` seconds.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from statistics import median

from overfill.engine.build import resolve_device
from overfill.kv.spec import DTypeName
from overfill.lab.bench.figure import Figure
from overfill.lab.bench.ours import OurEngine, Workload, load_engines
from overfill.model.manifest import Pair
from overfill.telemetry.metrics import DecodeMetrics, RouterMetrics
from overfill.telemetry.progress import Report, silent

BOUND = 0.02
"""Of decode throughput."""

SCRAPE_INTERVAL = 5.0
"""Seconds, as in deploy/prometheus."""

_WARMUP = 4
_RESAMPLES = 10_000


def measure_instrumentation(
    pair: Pair,
    *,
    batch: int,
    context: int,
    rounds: int,
    steps: int,
    dtype: DTypeName | None = None,
    report: Report = silent,
) -> list[Figure]:
    """``decode_counted`` and ``decode_plain`` in tokens/s, ``instrumentation_cost`` as a share of throughput, and
    ``instrumentation_cpu_cost``: the same in CPU time, which a busy machine hardly changes. ``low`` and ``high`` are
    the 95 % interval of the median over the rounds.

    Args:
        rounds: each is one turn with metrics and one without; which comes first changes from round to round.
        steps: in a turn.
    """
    total = _WARMUP + 2 * rounds * steps
    workload = Workload(batch, context + total + 2)
    full, decoder = load_engines(
        pair, dtype=dtype, device=resolve_device("cpu"), quantize=None, workload=workload, token_budget=2048
    )
    engine = decoder or full
    engine.begin(batch, context, total)
    try:
        engine.steps(_WARMUP)
        counted: list[_Seconds] = []
        plain: list[_Seconds] = []
        metrics = DecodeMetrics(), RouterMetrics()
        for index in range(rounds):
            report("Measuring", index, rounds)
            for with_metrics in (True, False) if index % 2 else (False, True):
                if with_metrics:
                    counted.append(_counted(engine, *metrics, steps, batch))
                else:
                    engine.watch(None)
                    clock = _Clock()
                    engine.steps(steps)
                    plain.append(clock.seconds())
        report("Measuring", rounds, rounds)
    finally:
        engine.end()

    def figure(name: str, values: Sequence[float], unit: str, bound: float | None = None) -> Figure:
        low, high = interval(values)
        return Figure(name, median(values), unit, bound, low=low, high=high)

    tokens = batch * steps
    return [
        figure("decode_counted", [tokens / wall for wall, _ in counted], "tokens/s"),
        figure("decode_plain", [tokens / wall for wall, _ in plain], "tokens/s"),
        figure("instrumentation_cpu_cost", _costs(counted, plain, 1), "share"),
        figure("instrumentation_cost", _costs(counted, plain, 0), "share", BOUND),
    ]


_Seconds = tuple[float, float]
"""By the clock, and of CPU time."""


class _Clock:
    def __init__(self) -> None:
        self._began = (time.perf_counter(), time.process_time())

    def seconds(self) -> _Seconds:
        return time.perf_counter() - self._began[0], time.process_time() - self._began[1]


def _costs(counted: Sequence[_Seconds], plain: Sequence[_Seconds], which: int) -> list[float]:
    """Of each round, the share of throughput that counting took."""
    return [1 - without[which] / with_[which] for with_, without in zip(counted, plain, strict=True)]


def interval(values: Sequence[float]) -> tuple[float, float]:
    """95 % of the medians of samples drawn from ``values`` (bootstrap), the same each time."""
    draw = random.Random(0)
    medians = sorted(median(draw.choices(values, k=len(values))) for _ in range(_RESAMPLES))
    return medians[round(0.025 * _RESAMPLES)], medians[round(0.975 * _RESAMPLES) - 1]


def _counted(engine: OurEngine, decode: DecodeMetrics, router: RouterMetrics, steps: int, batch: int) -> _Seconds:
    """Seconds of ``steps`` steps with everything that is counted about them, and their part of a scrape."""
    engine.watch(decode)
    clock, last = _Clock(), time.perf_counter()
    for _ in range(steps):
        engine.steps(1)
        now = time.perf_counter()
        for _ in range(batch):
            router.tokens(1, now - last, "")
        last = now
    wall, cpu = clock.seconds()
    scrape = _Clock()
    decode.render()
    router.render()
    share = wall / SCRAPE_INTERVAL
    return wall + share * scrape.seconds()[0], cpu + share * scrape.seconds()[1]

"""Declares, initialises, reads and renders metrics. ``overfill.telemetry.metrics`` lists them."""

from __future__ import annotations

import collections
import itertools
import math
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from overfill.version import __version__

Kind = Literal["counter", "gauge", "histogram"]
Labels = Mapping[str, Sequence[str]]
"""Label name -> values that are known in advance; their series exist from the start."""

Sampled = Iterable[tuple[Sequence[str], float]]
"""Pairs of label values and the metric's value."""

Counts = collections.Counter[tuple[str, ...]]
"""Numbers of events by label values. One thread adds, at a tenth of the cost of ``Counter``; any thread reads."""

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

LATENCY_BUCKETS = tuple(
    float(f"{digit * scale:.2g}")
    for scale, digits in (
        (1e-4, (5, 7)),
        *((10.0**e, (1, 1.5, 2, 3, 5, 7)) for e in range(-3, 1)),
        (10.0, (1, 2, 3, 6)),
    )
    for digit in digits
)
"""Seconds, 0.5 ms to 60 s. Up to 10 s, each bound is at most 1.7 times the previous one."""

BATCH_BUCKETS = (1.0, 2.0, 4.0, 8.0, 16.0, 24.0, 32.0, 48.0, 64.0, 96.0, 128.0, 256.0)
TOKEN_BUCKETS = (16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0, 8192.0)

_FAMILIES: Mapping[str, Any] = {
    "counter": CounterMetricFamily, "gauge": GaugeMetricFamily, "histogram": HistogramMetricFamily,
}  # fmt: skip

_M = TypeVar("_M", Counter, Histogram)


@dataclass(frozen=True, slots=True)
class Spec:
    """Declaration of a metric."""

    name: str
    kind: Kind
    help: str
    labels: Labels
    buckets: Sequence[float] = ()


class MetricSet:
    """Metrics of one service. Each set has its own registry, so that several sets may exist in one process.

    Args:
        beside: another set of the same worker, whose registry this one shares. The metrics of the process are in that
            one.

    Attributes:
        registry: Prometheus registry of the set.
        specs: declarations of its metrics.
    """

    def __init__(self, stage: str, beside: MetricSet | None = None) -> None:
        self.specs: list[Spec] = []
        if beside is None:
            self.registry = CollectorRegistry()
            self._stages = [stage]
            self._prefix = "overfill"
            ProcessCollector(registry=self.registry)
            self._read(
                "build_info",
                "gauge",
                "Version and stages of this process; always 1.",
                lambda: [((__version__, one), 1) for one in self._stages],
                {"version": (), "stage": ()},
            )
        else:
            self.registry = beside.registry
            if stage not in beside._stages:
                beside._stages.append(stage)
        self._prefix = f"overfill_{stage}"

    def render(self) -> bytes:
        """Renders all metrics in Prometheus' text format."""
        return generate_latest(self.registry)

    def _counter(self, what: str, help: str, labels: Labels | None = None) -> Counter:
        spec = self._declare(what, "counter", help, labels)
        return _begin(Counter(spec.name, help, list(spec.labels), registry=self.registry), spec)

    def _histogram(self, what: str, help: str, buckets: Sequence[float], labels: Labels | None = None) -> Histogram:
        spec = self._declare(what, "histogram", help, labels, buckets)
        return _begin(Histogram(spec.name, help, list(spec.labels), registry=self.registry, buckets=buckets), spec)

    def _read(
        self,
        what: str,
        kind: Literal["counter", "gauge"],
        help: str,
        read: Callable[[], Sampled],
        labels: Labels | None = None,
    ) -> None:
        """Declares a metric whose values are read at each scrape, on the thread that serves it."""
        self.registry.register(_Reader(self._declare(what, kind, help, labels), read))

    def _counts(self, what: str, help: str, labels: Labels | None = None) -> Counts:
        """Declares a counter for events that come with every request; add to the returned counts."""
        labels = labels or {}
        counts = Counts(dict.fromkeys(itertools.product(*labels.values()), 0))
        self._read(what, "counter", help, lambda: list(counts.items()), labels)
        return counts

    def _tallies(
        self, what: str, help: str, buckets: Sequence[float], labels: Labels | None = None
    ) -> Mapping[tuple[str, ...], Tally]:
        """Declares a histogram for values that come with every token or request, one for all values of the labels."""
        spec = self._declare(what, "histogram", help, labels, buckets)
        tallies = {values: Tally(buckets) for values in itertools.product(*spec.labels.values())}
        self.registry.register(
            _Reader(spec, lambda: [(labels, *tally.cumulative()) for labels, tally in tallies.items()])
        )
        return tallies

    def _declare(self, what: str, kind: Kind, help: str, labels: Labels | None, buckets: Sequence[float] = ()) -> Spec:
        spec = Spec(f"{self._prefix}_{what}", kind, help, labels or {}, buckets)
        self.specs.append(spec)
        return spec


class Tally:
    """Counts values by bucket. One thread adds values, at a tenth of the cost of ``Histogram``; any thread reads.

    Args:
        bounds: upper bounds of the buckets, ascending.
    """

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = tuple(bounds)
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        """Adds ``value``, ``times`` times."""
        self._counts[bisect_left(self._bounds, value)] += times
        self._sum += value * times

    def cumulative(self) -> tuple[list[tuple[str, float]], float]:
        """The number of values up to each bound, as Prometheus wants it, and the sum of all values."""
        bounds = map(floatToGoString, (*self._bounds, math.inf))
        return list(zip(bounds, itertools.accumulate(self._counts), strict=True)), self._sum


class _Reader(Collector):
    """Makes the samples of a metric at each scrape, of label values and what the metric's family takes with them."""

    def __init__(self, spec: Spec, read: Callable[[], Iterable[tuple[Any, ...]]]) -> None:
        self._spec = spec
        self._read = read

    def describe(self) -> Iterator[Metric]:
        yield self._family()

    def collect(self) -> Iterator[Metric]:
        family = self._family()
        for labels, *values in self._read():
            family.add_metric(list(labels), *values)
        yield family

    def _family(self) -> Any:
        spec = self._spec
        return _FAMILIES[spec.kind](spec.name, spec.help, labels=list(spec.labels))


def _begin(metric: _M, spec: Spec) -> _M:
    """Creates a series for every combination of label values known in advance."""
    if spec.labels:
        for combination in itertools.product(*spec.labels.values()):
            metric.labels(*combination)
    return metric

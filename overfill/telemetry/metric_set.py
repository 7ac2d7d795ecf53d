"""Declares, initialises, reads and renders metrics. ``overfill.telemetry.metrics`` lists them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from overfill.version import __version__

Kind = Literal["counter", "gauge", "histogram"]
Labels = Mapping[str, Sequence[str]]
"""Label name -> values that are known in advance; their series exist from the start."""

Sampled = Iterable[tuple[Sequence[str], float]]
"""Pairs of label values and the metric's value."""

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

    Attributes:
        registry: Prometheus registry of the set.
        specs: declarations of its metrics.
    """

    def __init__(self, stage: str) -> None:
        self.registry = CollectorRegistry()
        self.specs: list[Spec] = []
        self._prefix = "overfill"
        ProcessCollector(registry=self.registry)
        self._read(
            "build_info",
            "gauge",
            "Version and stage of this process; always 1.",
            lambda: [((__version__, stage), 1)],
            {"version": (), "stage": ()},
        )
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

    def _declare(self, what: str, kind: Kind, help: str, labels: Labels | None, buckets: Sequence[float] = ()) -> Spec:
        spec = Spec(f"{self._prefix}_{what}", kind, help, labels or {}, buckets)
        self.specs.append(spec)
        return spec


class _Reader(Collector):
    def __init__(self, spec: Spec, read: Callable[[], Sampled]) -> None:
        self._spec = spec
        self._read = read

    def describe(self) -> Iterator[Metric]:
        yield self._family()

    def collect(self) -> Iterator[Metric]:
        family = self._family()
        for labels, value in self._read():
            family.add_metric(list(labels), value)
        yield family

    def _family(self) -> CounterMetricFamily | GaugeMetricFamily:
        spec = self._spec
        kind = CounterMetricFamily if spec.kind == "counter" else GaugeMetricFamily
        return kind(spec.name, spec.help, labels=list(spec.labels))


def _begin(metric: _M, spec: Spec) -> _M:
    """Creates a series for every combination of label values known in advance."""
    if spec.labels:
        for combination in itertools.product(*spec.labels.values()):
            metric.labels(*combination)
    return metric

"""Every metric that our processes export: names, labels, buckets. No torch; knows no service."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from overfill import __version__
from overfill.v1 import inference_pb2

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

LATENCY_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
"""Seconds; honest at 5 ms and at 5 s."""


class RouterMetrics:
    """What a router counts. Each has a registry of its own, so that several may live in one process."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        build = Gauge("overfill_build_info", "Version of this process; always 1.", ["version"], registry=self.registry)
        build.labels(__version__).set(1)
        self._http = Counter(
            "overfill_router_http_requests_total",
            "HTTP requests, by route and status.",
            ["route", "status"],
            registry=self.registry,
        )
        self._ttft = Histogram(
            "overfill_router_ttft_seconds",
            "Request received to first token handed to the client.",
            buckets=LATENCY_BUCKETS,
            registry=self.registry,
        )
        self._total = Histogram(
            "overfill_router_request_seconds",
            "Request received to answer complete.",
            buckets=LATENCY_BUCKETS,
            registry=self.registry,
        )
        self._prompt = Counter(
            "overfill_router_prompt_tokens_total", "Prompt tokens of complete answers.", registry=self.registry
        )
        self._completion = Counter(
            "overfill_router_completion_tokens_total", "Tokens of complete answers.", registry=self.registry
        )
        self._migrations = Counter(
            "overfill_router_migrations_total", "Moves to another decode worker.", registry=self.registry
        )

    def http(self, route: str, status: int) -> None:
        """An HTTP request to ``route`` (a pattern, or "unknown") ended with ``status``."""
        self._http.labels(route, str(status)).inc()

    def answered(self, finished: inference_pb2.Finished) -> None:
        """An answer is complete."""
        if finished.timing.HasField("ttft_ns"):
            self._ttft.observe(finished.timing.ttft_ns / 1e9)
        self._total.observe(finished.timing.total_ns / 1e9)
        self._prompt.inc(finished.usage.prompt_tokens)
        self._completion.inc(finished.usage.completion_tokens)
        self._migrations.inc(finished.migrations)

    def render(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self.registry)

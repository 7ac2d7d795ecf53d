"""Result of a simulated run: its counters, and its figures. Names are those of ``overfill.lab.traffic.figures``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from overfill.lab.simulate.decode import SimDecode
from overfill.lab.simulate.histogram import Histogram
from overfill.lab.simulate.options import SimulationOptions
from overfill.lab.simulate.prefill import SimPrefill
from overfill.lab.simulate.request import SimRequest
from overfill.lab.simulate.workers import SimWorker
from overfill.lab.traffic.figures import Figure, latencies
from overfill.request.names import cached_by_source

PERCENTILES = {"p90": "p90", "p95": "p95", "p99": "p99"}
"""Columns of a table of figures, and what they show."""


@dataclass(slots=True)
class Counters:
    """Counters of a run.

    Attributes:
        most_workers: Largest number of workers of each pool at once: "prefill", or the tier. Workers that are starting
            or draining count. A worker with both stages is in both pools.
        prompts, local_prompts: Prompts computed, and those of them computed where their answer was written.
        prompt_tokens, cached_tokens: Tokens of these prompts, and those that were not computed.
        peer_tokens, disk_tokens: Parts of ``cached_tokens`` that came from other workers and from disk.
        new_tokens: Part of ``prompt_tokens`` that no worker had computed before.
    """

    checks: int = 0
    refusals: int = 0
    preemptions: int = 0
    failures: int = 0
    migrations: int = 0
    most_workers: Counter[str] = field(default_factory=Counter)
    prompts: int = 0
    local_prompts: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    peer_tokens: int = 0
    disk_tokens: int = 0
    new_tokens: int = 0


@dataclass(frozen=True, slots=True)
class SimulationResult:
    """Result of one run.

    Attributes:
        requests: All requests, in order of arrival.
        workers: All workers, also those that have left.
        gaps: Seconds between successive tokens, over all answers. A request's ``itl`` is the mean of its own gaps.
    """

    options: SimulationOptions
    requests: Sequence[SimRequest]
    workers: Sequence[SimWorker]
    gaps: Histogram
    counters: Counters

    @property
    def attainment(self) -> float:
        """Share of all requests that meet their objective."""
        return sum(request.met for request in self.requests) / max(1, len(self.requests))

    @property
    def figures(self) -> dict[str, float]:
        """The numbers of ``measurements`` by name, such as ``ttft`` and ``ttft_p99``."""
        found: dict[str, float] = {}
        for one in self.measurements():
            values = {"": one.value} | {f"_{mark}": getattr(one, mark) for mark in PERCENTILES}
            found |= {one.name + mark: value for mark, value in values.items() if value is not None}
        return found

    def measurements(self) -> list[Figure]:
        """Returns the figures of the run that have a value. Those of one tier have its name behind a dot."""
        counters, requests = self.counters, self.requests
        done = [request for request in requests if request.ok]
        span = max((request.last for request in done if request.last is not None), default=0.0)
        met = sum(request.met for request in requests)
        rows = [*_latencies(done)]
        if self.gaps.total:
            rows.append(Figure.latency("itl", self.gaps.percentile))
        errors = Counter(f"failed.{request.error}" for request in requests if request.error)
        rows += _rows("requests", requests=len(requests), failed=len(requests) - len(done), **errors)
        rows += _rows("of requests", attainment=_share(met, len(requests)))
        rows += _rows("1/s", goodput=_share(met, span))
        rows += _rows("tokens/s", output_tokens=_share(sum(r.trace.output_tokens for r in done), span))
        rows += _rows("of tokens", cached=_share(counters.cached_tokens, counters.prompt_tokens))
        if counters.cached_tokens:
            for source, tokens in cached_by_source(counters).items():
                rows += _rows("of tokens", **{f"cached_{source}": _share(tokens, counters.prompt_tokens)})
            computed = counters.prompt_tokens - counters.cached_tokens
            rows += _rows("x", computed_per_new=_share(computed, counters.new_tokens))
        if self.options.colocated:
            rows += _rows("of prompts", local=_share(counters.local_prompts, counters.prompts))
        rows += _rows(
            "of time",
            prefill_utilisation=_utilisation((worker, worker.prefill) for worker in self.workers),
            decode_utilisation=_utilisation((worker, worker.decode) for worker in self.workers),
        )
        rows += _rows("hours", worker_hours=sum(worker.seconds for worker in self.workers) / 3600)
        rows += _rows("at most", **{f"workers.{pool}": number for pool, number in counters.most_workers.items()})
        rows += _rows("", refusals=counters.refusals, preemptions=counters.preemptions, migrations=counters.migrations)
        rows += _rows("", failures=counters.failures or None, checked_events=counters.checks or None)
        for tier in self.options.tiers:
            rows += self._tier(tier.name, done)
        return rows

    def _tier(self, tier: str, answers: Sequence[SimRequest]) -> list[Figure]:
        """Returns the figures of the requests that ask for a tier, and of the ``answers`` that it wrote."""
        asking = [request for request in self.requests if request.asked == tier]
        wrote = [request for request in answers if request.job.tier == tier]
        refused = sum(request.error == "Overloaded" for request in asking)
        failed = sum(bool(request.error) for request in asking) - refused
        elsewhere = sum(request.ok and request.job.tier != tier for request in asking)
        rows = _rows("of requests", attainment=_share(sum(request.met for request in asking), len(asking)))
        rows += _rows("requests", requests=len(asking), refused=refused, failed=failed, browned_out=elsewhere)
        rows += [*_rows("answers", answers=len(wrote)), *_latencies(wrote)]
        return [replace(row, name=f"{row.name}.{tier}") for row in rows]


def _latencies(answers: Sequence[SimRequest]) -> list[Figure]:
    return latencies([request.outcome for request in answers], ("ttft", "request_itl", "e2e"))


def _utilisation(parts: Iterable[tuple[SimWorker, SimPrefill | SimDecode | None]]) -> float | None:
    """Returns the share of workers' time that these engines spent in steps."""
    times = [(engine.busy, worker.seconds) for worker, engine in parts if engine is not None]
    return _share(sum(busy for busy, _ in times), sum(seconds for _, seconds in times))


def _rows(unit: str, **values: float | None) -> list[Figure]:
    return [Figure(name, value, unit) for name, value in values.items() if value is not None]


def _share(part: float, whole: float) -> float | None:
    return part / whole if whole else None

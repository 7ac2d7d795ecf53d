"""The metrics of a router."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise, product
from typing import Protocol

from overfill.request.names import KV_SOURCES, TTFT_PARTS, cached_by_source
from overfill.telemetry.metric_set import LATENCY_BUCKETS, Labels, MetricSet, Sampled
from overfill.telemetry.outcomes import OUTCOMES, REFUSALS, outcome_of, refusal_reason
from overfill.v1 import decode_pb2, inference_pb2

_TIMED_PARTS = tuple(((part,), f"{part}_ns") for part in TTFT_PARTS)
STAGES = ("prefill", "decode")
WORKER_STATES = ("ready", "starting", "draining", "silent")

APIS = ("chat", "completions", "responses", "messages", "grpc")
"""The APIs through which requests come: values of the label ``api``."""

PREFILL_AGAIN = ("preempted", "failed", "refused", "incompatible", "rest")
"""Reasons for which a decode worker requests a prompt's KV again (``NeedPrefill.Reason``)."""

MAX_KEY_SERIES = 100
"""Maximum number of API keys with their own series; further keys share the series ``other``."""

MAX_ADAPTER_SERIES = 64
"""Maximum number of adapters with their own series; further adapters share the series ``other``."""


_Requests = Counter[tuple[str | None, ...]]


class PoolTargetNumbers(Protocol):
    """The scaling policy's target for one pool; see ``overfill.routing.scaling.PoolTarget``."""

    @property
    def workers(self) -> int: ...

    @property
    def need(self) -> float: ...

    @property
    def inputs(self) -> Mapping[str, float]: ...


class ScalingTargets(Protocol):
    """The scaling policy's targets for all pools; see ``overfill.routing.scaling.Targets``."""

    def pools(self) -> Sequence[tuple[str, str, PoolTargetNumbers]]:
        """Returns stage, tier and target of each pool. The prefill pool has the tier ""."""


class RouterMetrics(MetricSet):
    """Metrics of a router. Call all methods on its event loop.

    Args:
        tiers: names of the stack's tiers. The label ``tier`` has these values; it is empty where no tier is concerned.
        revisions: names of the revisions that the router serves; "" in a stack without revisions.
    """

    def __init__(self, tiers: Sequence[str] = ("default",), revisions: Sequence[str] = ("",)) -> None:
        super().__init__("router")
        counter, counts = self._counter, self._counts
        tier: Labels = {"tier": tuple(tiers)}
        asked = ("", *tiers)
        self._http = counts("http_requests_total", "HTTP requests, by route and status.", {"route": (), "status": ()})
        by: Labels = {"outcome": OUTCOMES, "tier": asked, "api": APIS}
        # By outcome, tier, API and revision, which is None if a request was refused before one was chosen.
        self._requests: _Requests = Counter(dict.fromkeys(product(*by.values(), (*revisions, None)), 0))
        self._read(
            "requests_total",
            "counter",
            "Generation requests that have ended, by outcome, tier and API.",
            lambda: _summed(self._requests, lambda outcome, tier, api, _: (outcome, tier, api)),
            by,
        )
        self._read(
            "revision_requests_total",
            "counter",
            "Generation requests that have ended, by revision and outcome, without those refused before a revision "
            "was chosen.",
            lambda: _summed(
                self._requests, lambda outcome, _, __, revision: None if revision is None else (revision, outcome)
            ),
            {"revision": revisions, "outcome": OUTCOMES},
        )
        self._ttft = self._tallies(
            "ttft_seconds",
            "Time from receiving a request to handing its first token to the client.",
            LATENCY_BUCKETS,
            tier,
        )
        self._parts = self._tallies(
            "ttft_part_seconds",
            "Parts of the time to first token, each measured on its own; unattributed is the rest.",
            LATENCY_BUCKETS,
            {"part": (*TTFT_PARTS, "unattributed")},
        )
        self._itl = self._tallies(
            "itl_seconds",
            "Time per token between two messages to a client (inter-token latency), counted once per token.",
            LATENCY_BUCKETS,
            tier,
        )
        self._tpot = self._tallies(
            "tpot_seconds",
            "Mean time per token after the first, over a whole answer (time per output token).",
            LATENCY_BUCKETS,
            tier,
        )
        self._total = self._tallies(
            "request_seconds", "Time from receiving a request to the end of its answer.", LATENCY_BUCKETS, tier
        )
        self._prompt = counts("prompt_tokens_total", "Prompt tokens of accepted requests, by API.", {"api": APIS})
        self._cached = counts(
            "cached_prompt_tokens_total",
            "Prompt tokens of complete answers that the full model did not compute, by where their KV was: in the "
            "worker's memory, at another worker, or on disk.",
            {"source": KV_SOURCES},
        )
        self._completion = counts("completion_tokens_total", "Tokens handed to clients.", {**tier, "api": APIS})
        self._migrations = counts("migrations_total", "Migrations of an answer to another decode worker.", tier)
        self._brownouts = counts(
            "brownouts_total",
            "Requests that a cheaper tier answers because the requested one is overloaded.",
            {"tier": tuple(tiers), "to": tuple(tiers)},
        )
        self._fallbacks = counts(
            "fallbacks_total",
            "Answers that another tier wrote, or went on with, because theirs had no worker left.",
            {"tier": tuple(tiers), "to": tuple(tiers)},
        )
        self._key_requests = counts("key_requests_total", "Accepted requests, by name of API key.", {"key": ()})
        self._key_tokens = counts(
            "key_tokens_total",
            "Tokens of accepted requests, by name of API key.",
            {"key": (), "kind": ("prompt", "completion")},
        )
        self._adapter_requests = counts("adapter_requests_total", "Accepted requests, by adapter.", {"adapter": ()})
        self._adapter_tokens = counts(
            "adapter_tokens_total",
            "Tokens of accepted requests, by adapter.",
            {"adapter": (), "kind": ("prompt", "completion")},
        )
        self._refusals = counter(
            "refusals_total", "Refused requests, by reason; requests_total includes them.",
            {"reason": REFUSALS, "tier": asked},
        )  # fmt: skip
        self._failed_attempts = counter(
            "failed_attempts_total",
            "Attempts that failed on a decode worker and were retried on another, by outcome.",
            {"reason": OUTCOMES[1:]},
        )
        self._again = counter(
            "prefill_again_total", "Repeated requests of decode workers for a prompt's KV, by reason.",
            {"reason": PREFILL_AGAIN},
        )  # fmt: skip
        pool: Labels = {"stage": STAGES, "tier": ()}
        self._scaled = counter(
            "scaling_decisions_total",
            "Changes of scaling_target_workers, by pool and direction.",
            {**pool, "direction": ("up", "down")},
        )
        self._lost = counter(
            "workers_lost_total",
            "Workers that disconnected without a drain; one with both stages counts in each.",
            pool,
        )
        # These series exist from the start, but not every stage with every tier.
        for stage, name in (("prefill", ""), *(("decode", name) for name in tiers)):
            self._lost.labels(stage, name)
            for direction in ("up", "down"):
                self._scaled.labels(stage, name, direction)
        self._router_need = 0.0
        self._targets: dict[str, ScalingTargets] = {}  # by revision
        of_revision: Labels = {"revision": tuple(revisions)}
        self._read(
            "scaling_target_workers",
            "gauge",
            "Number of workers that the scaling policy computes for this router's own requests; a recommendation.",
            lambda: self._scaling(lambda target: [((), target.workers)]),
            {**pool, **of_revision},
        )
        self._read(
            "scaling_needed_workers",
            "gauge",
            "scaling_target_workers before rounding, hysteresis and bounds; for the stage router, routers. "
            "The pool needs the sum over all routers.",
            lambda: [*self._scaling(lambda target: [((), target.need)]), (("router", "", ""), self._router_need)],
            {"stage": (*STAGES, "router"), "tier": (), **of_revision},
        )
        self._read(
            "scaling_input",
            "gauge",
            "Inputs of the scaling policy; docs/explanation/routing-and-scaling.md explains them.",
            lambda: self._scaling(lambda target: [((name,), value) for name, value in target.inputs.items()]),
            {**pool, **of_revision, "input": ()},
        )
        self._keys: set[str] = set()
        self._adapters: set[str] = set()
        self._waiting: Callable[[], Sampled] = lambda: []
        self._running: Callable[[], Sampled] = lambda: []
        self._workers: Callable[[], Sampled] = lambda: []
        self._shares: Callable[[], Sampled] = lambda: []
        self._in_brownout: Callable[[], Sampled] = lambda: []
        self._sessions: Callable[[], int] = lambda: 0
        self._read(
            "sessions",
            "gauge",
            "Clients' sessions with a request in the last five minutes; at most 10,000 are counted.",
            lambda: [((), self._sessions())],
        )
        tier_of_revision = {**tier, **of_revision}
        self._read(
            "waiting_requests", "gauge", "Requests in the router's queue.", lambda: self._waiting(), tier_of_revision
        )
        self._read(
            "running_requests", "gauge", "Requests running on workers.", lambda: self._running(), tier_of_revision
        )
        self._read(
            "rollout_percent",
            "gauge",
            "Share of new conversations that the revision gets, as it is set now; 100 for the only revision.",
            lambda: self._shares(),
            of_revision,
        )
        self._read(
            "brownout",
            "gauge",
            "1 while the tier is overloaded, so that requests which allow it go to the next tier; otherwise 0.",
            lambda: self._in_brownout(),
            tier_of_revision,
        )
        self._read(
            "workers",
            "gauge",
            "Joined workers, by stage, tier, revision and state.",
            lambda: self._workers(),
            {"stage": STAGES, "tier": (), **of_revision, "state": WORKER_STATES},
        )

    def watch(
        self,
        waiting: Callable[[], Sampled],
        running: Callable[[], Sampled],
        workers: Callable[[], Sampled],
        brownout: Callable[[], Sampled],
        shares: Callable[[], Sampled],
        sessions: Callable[[], int],
    ) -> None:
        """Sets the functions that gauges read at each scrape.

        ``workers`` returns counts by stage, tier, revision and state, ``shares`` values by revision, ``sessions`` a
        number; the others return values by tier and revision.
        """
        self._waiting, self._running, self._workers, self._in_brownout = waiting, running, workers, brownout
        self._shares, self._sessions = shares, sessions

    def http(self, route: str, status: int) -> None:
        """Counts an HTTP request to ``route`` (a pattern, or "unknown") that ended with ``status``."""
        self._http[route, str(status)] += 1

    def accepted(self, prompt_tokens: int, key: str, api: str, adapter: str = "") -> None:
        """Counts an accepted request.

        Args:
            key: name of its API key; empty without keys.
            adapter: name of the adapter that writes the answer; empty without one.
        """
        self._prompt[api,] += prompt_tokens
        key = self._key(key)
        self._key_requests[key,] += 1
        self._key_tokens[key, "prompt"] += prompt_tokens
        if adapter:
            adapter = _bounded(adapter, self._adapters, MAX_ADAPTER_SERIES)
            self._adapter_requests[adapter,] += 1
            self._adapter_tokens[adapter, "prompt"] += prompt_tokens

    def tokens(self, count: int, since_last: float | None, key: str, tier: str, api: str, adapter: str = "") -> None:
        """Counts tokens handed to a client, ``since_last`` seconds after the previous ones; None for the first."""
        self._completion[tier, api] += count
        self._key_tokens[self._key(key), "completion"] += count
        if adapter:
            self._adapter_tokens[_bounded(adapter, self._adapters, MAX_ADAPTER_SERIES), "completion"] += count
        if since_last is not None and count:
            # One value per token: clients choose the stream interval, and must not look slow by a long one.
            self._itl[tier,].observe(since_last / count, count)

    def refused(self, error: BaseException, tier: str, api: str, revision: str | None = "") -> None:
        """Counts a request that ``error`` has refused. While they are unknown, ``tier`` is empty, ``revision`` None."""
        self.ended(error, tier, api, revision)
        self._refusals.labels(refusal_reason(error), tier).inc()

    def fell_back(self, tier: str, to: str) -> None:
        """Counts an answer that ``to`` writes, or goes on with, because ``tier`` has no worker left."""
        self._fallbacks[tier, to] += 1

    def brownout(self, tier: str, to: str) -> None:
        """Counts a request for ``tier`` that ``to`` answers, because ``tier`` is overloaded."""
        self._brownouts[tier, to] += 1

    def attempt_failed(self, error: BaseException) -> None:
        """Counts an attempt that failed on a decode worker, whether or not the request is retried."""
        self._failed_attempts.labels(outcome_of(error)).inc()

    def prefill_again(self, reason: decode_pb2.NeedPrefill.Reason) -> None:
        """Counts a decode worker's repeated request for a prompt's KV."""
        name = decode_pb2.NeedPrefill.Reason.Name(reason).lower().rpartition("_")[2]
        self._again.labels(name if name in PREFILL_AGAIN else "failed").inc()

    def scaling(self, targets: ScalingTargets, revision: str = "") -> None:
        """Sets the scaling policy's current targets for the pools of a revision, and counts their changes."""
        before, self._targets[revision] = self._targets.get(revision), targets
        if before is None:
            return
        for (stage, tier, was), (_, _, now) in zip(before.pools(), targets.pools(), strict=True):
            if was.workers != now.workers:
                self._scaled.labels(stage, tier, "up" if now.workers > was.workers else "down").inc()

    def router_need(self, routers: float) -> None:
        """Sets the number of routers that this router's own load needs."""
        self._router_need = routers

    def _scaling(self, values: Callable[[PoolTargetNumbers], Sampled]) -> Sampled:
        return [
            ((stage, tier, revision, *labels), value)
            for revision, targets in list(self._targets.items())
            for stage, tier, pool in targets.pools()
            for labels, value in values(pool)
        ]

    def ended(self, error: BaseException | None, tier: str, api: str, revision: str | None = "") -> None:
        """Counts a request that has ended; ``error`` is None after success.

        If none was chosen, ``tier`` is empty and ``revision`` None.
        """
        self._requests[outcome_of(error), tier, api, revision] += 1

    def answered(self, finished: inference_pb2.Finished, tier: str) -> None:
        """Records timing and token counts of a complete answer that ends in ``tier``."""
        timing, usage = finished.timing, finished.usage
        total = timing.total_ns / 1e9
        self._total[tier,].observe(total)
        for source, tokens in cached_by_source(usage).items():
            self._cached[source,] += tokens
        self._migrations[tier,] += finished.migrations
        for before, after in pairwise(finished.parts):
            self.fell_back(before.tier, after.tier)
        if not timing.HasField("ttft_ns"):
            return
        ttft = left = timing.ttft_ns / 1e9
        self._ttft[tier,].observe(ttft)
        parts = self._parts
        for part, name in _TIMED_PARTS:
            seconds = getattr(timing, name) / 1e9
            left -= seconds
            parts[part].observe(seconds)
        parts["unattributed",].observe(max(0.0, left))
        if usage.completion_tokens > 1:
            self._tpot[tier,].observe((total - ttft) / (usage.completion_tokens - 1))

    def worker_lost(self, stage: str, tier: str) -> None:
        """Counts a worker that disconnected without a drain; a prefill worker has the tier ""."""
        self._lost.labels(stage, tier).inc()

    def _key(self, key: str) -> str:
        return _bounded(key, self._keys, MAX_KEY_SERIES) if key else "none"


def _summed(counts: _Requests, labels: Callable[..., tuple[str, ...] | None]) -> Sampled:
    """Adds up the counts for which ``labels`` returns the same; leaves out those for which it returns None."""
    sums: Counter[tuple[str, ...]] = Counter()
    for names, count in list(counts.items()):
        if (label := labels(*names)) is not None:
            sums[label] += count
    return list(sums.items())


def _bounded(name: str, known: set[str], most: int) -> str:
    """Returns ``name``, or "other" if it would be one more than ``most`` in ``known``, to which it is added."""
    if name not in known and len(known) >= most:
        return "other"
    known.add(name)
    return name

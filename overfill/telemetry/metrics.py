"""Every metric that our processes export: names, labels, buckets. No torch; knows no service.

``docs/metrics.md`` is made from what is declared here (``overfill metrics``). A name is
``overfill_<stage>_<what>_<unit>``; a label has few values, all of them there from the start where they are known, so
that a rate never lacks its first increase. What an engine knows anyway is read when Prometheus asks.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Protocol

from overfill.errors import (
    DeadlineExceeded,
    Incompatible,
    InvalidRequest,
    ModelNotFound,
    Overloaded,
    PermissionDenied,
    PromptTooLong,
    RequestCancelled,
    ShuttingDown,
    TransferFailed,
    Unauthenticated,
    Unavailable,
)
from overfill.request.names import CODEC_NAMES, CODECS
from overfill.telemetry.metric_set import MetricSet, Sampled, Spec
from overfill.v1 import common_pb2, decode_pb2, inference_pb2

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
"""Seconds, 0.5 ms to 60 s; below 10 s no bound is more than 1.7 times the one before: honest at 5 ms and at 5 s."""

BATCH_BUCKETS = (1.0, 2.0, 4.0, 8.0, 16.0, 24.0, 32.0, 48.0, 64.0, 96.0, 128.0, 256.0)
TOKEN_BUCKETS = (16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0, 8192.0)

TTFT_PARTS = ("router_queue", "decode_reservation", "prefill_queue", "prefill_compute", "return_path", "unattributed")
STAGES = ("prefill", "decode")
WORKER_STATES = ("ready", "draining", "silent")
REFUSALS = (
    "queue_full", "deadline", "max_wait", "key_rate", "key_concurrency", "too_long", "invalid", "not_found",
    "shutting_down", "other",
)  # fmt: skip
"""Why a request was not taken. The first ones are ``Overloaded.reason``, as admission gives it."""

PREFILL_AGAIN = ("preempted", "failed", "refused", "incompatible")
"""Why a decode worker wanted a prompt's KV again (``NeedPrefill.Reason``)."""

MAX_KEY_SERIES = 100
"""API keys with series of their own; the others share ``other``."""

_OUTCOMES: dict[type[BaseException], str] = {
    PromptTooLong: "too_long",
    InvalidRequest: "invalid",
    ModelNotFound: "not_found",
    Unauthenticated: "unauthenticated",
    PermissionDenied: "forbidden",
    Overloaded: "overloaded",
    Incompatible: "incompatible",
    TransferFailed: "transfer_failed",
    DeadlineExceeded: "deadline",
    RequestCancelled: "cancelled",
    ShuttingDown: "shutting_down",
    Unavailable: "unavailable",
    asyncio.CancelledError: "cancelled",
    GeneratorExit: "cancelled",
}
OUTCOMES = tuple(dict.fromkeys(("ok", *_OUTCOMES.values(), "internal")))


def outcome_of(error: BaseException | None) -> str:
    """How something ended, as a label; None is success, an error of no class of ours "internal"."""
    if error is None:
        return "ok"
    return next((_OUTCOMES[kind] for kind in type(error).__mro__ if kind in _OUTCOMES), "internal")


def refusal_reason(error: BaseException) -> str:
    """Why a request was not taken, as a label."""
    reason = error.reason if isinstance(error, Overloaded) else outcome_of(error)
    return reason if reason in REFUSALS else "other"


class EngineNumbers(Protocol):
    """What is read of an engine's load (``engine.sequence.EngineLoad``) when Prometheus asks."""

    @property
    def blocks_used(self) -> int: ...
    @property
    def blocks_cached(self) -> int: ...
    @property
    def blocks_total(self) -> int: ...
    @property
    def blocks_reserved(self) -> int: ...
    @property
    def blocks_leaked(self) -> int: ...
    @property
    def running(self) -> int: ...
    @property
    def waiting(self) -> int: ...
    @property
    def queued_tokens(self) -> int: ...
    @property
    def prefix_tokens_looked_up(self) -> int: ...
    @property
    def prefix_tokens_found(self) -> int: ...


class PullNumbers(Protocol):
    """What is counted of a handoff (``kv.receiver.PullStats``): nanoseconds since it was asked for, and bytes."""

    @property
    def first_kv_ns(self) -> int: ...
    @property
    def last_kv_ns(self) -> int: ...
    @property
    def kv_bytes(self) -> int: ...
    @property
    def shared_bytes(self) -> int: ...
    @property
    def broken_streams(self) -> int: ...


class PoolTarget(Protocol):
    """What the scaling policy wants of one pool; see ``overfill.routing.scaling.PoolTarget``."""

    @property
    def workers(self) -> int: ...

    @property
    def need(self) -> float: ...

    @property
    def inputs(self) -> Mapping[str, float]: ...


class ScalingTargets(Protocol):
    """What the scaling policy wants of both pools; see ``overfill.routing.scaling.Targets``."""

    @property
    def prefill_pool(self) -> PoolTarget: ...

    @property
    def decode_pool(self) -> PoolTarget: ...


class RouterMetrics(MetricSet):
    """What a router counts. All calls on its event loop."""

    def __init__(self) -> None:
        super().__init__("router")
        counter, histogram = self._counter, self._histogram
        self._http = counter("http_requests_total", "HTTP requests, by route and status.", {"route": (), "status": ()})
        self._requests = counter(
            "requests_total", "Requests for an answer that have ended, by how.", {"outcome": OUTCOMES}
        )
        self._ttft = histogram("ttft_seconds", "Request received to first token handed to the client.", LATENCY_BUCKETS)
        self._parts = histogram(
            "ttft_part_seconds",
            "Parts of the time to first token, each measured by itself; unattributed is what they leave.",
            LATENCY_BUCKETS,
            {"part": TTFT_PARTS},
        )
        self._itl = histogram(
            "itl_seconds", "Between two messages of tokens to a client (inter-token latency).", LATENCY_BUCKETS
        )
        self._tpot = histogram(
            "tpot_seconds", "Per token after the first, of a whole answer (time per output token).", LATENCY_BUCKETS
        )
        self._total = histogram("request_seconds", "Request received to answer complete.", LATENCY_BUCKETS)
        self._prompt = counter("prompt_tokens_total", "Prompt tokens of requests taken.")
        self._cached = counter(
            "cached_prompt_tokens_total", "Prompt tokens of complete answers that the full model did not compute."
        )
        self._completion = counter("completion_tokens_total", "Tokens handed to clients.")
        self._migrations = counter("migrations_total", "Moves of an answer to another decode worker.")
        self._key_requests = counter("key_requests_total", "Requests taken, by name of API key.", {"key": ()})
        self._key_tokens = counter(
            "key_tokens_total",
            "Tokens of requests taken, by name of API key.",
            {"key": (), "kind": ("prompt", "completion")},
        )
        self._refusals = counter(
            "refusals_total", "Requests that were not taken, by reason; they are in requests_total too.",
            {"reason": REFUSALS},
        )  # fmt: skip
        self._failed_attempts = counter(
            "failed_attempts_total",
            "Attempts that a decode worker failed, after which the request goes on at another, by how.",
            {"reason": OUTCOMES[1:]},
        )
        self._again = counter(
            "prefill_again_total", "Times a decode worker asked for a prompt's KV again, by reason.",
            {"reason": PREFILL_AGAIN},
        )  # fmt: skip
        self._scaled = counter(
            "scaling_decisions_total",
            "Times that scaling_target_workers changed, by stage and direction.",
            {"stage": STAGES, "direction": ("up", "down")},
        )
        self._targets: ScalingTargets | None = None
        self._read(
            "scaling_target_workers",
            "gauge",
            "Workers that the scaling policy makes of this router's numbers; nobody has to follow it.",
            lambda: self._scaling(lambda pool: [((), pool.workers)]),
            {"stage": STAGES},
        )
        self._read(
            "scaling_needed_workers",
            "gauge",
            "The same before rounding, hysteresis and bounds.",
            lambda: self._scaling(lambda pool: [((), pool.need)]),
            {"stage": STAGES},
        )
        self._read(
            "scaling_input",
            "gauge",
            "Every number that the policy used; docs/operations.md explains them.",
            lambda: self._scaling(lambda pool: [((name,), value) for name, value in pool.inputs.items()]),
            {"stage": STAGES, "input": ()},
        )
        self._lost = counter("workers_lost_total", "Workers that left without having been drained.", {"stage": STAGES})
        self._keys: set[str] = set()
        self._waiting: Callable[[], int] = lambda: 0
        self._running: Callable[[], int] = lambda: 0
        self._workers: Callable[[], Sampled] = lambda: []
        self._read("waiting_requests", "gauge", "Requests without a place.", lambda: [((), self._waiting())])
        self._read("running_requests", "gauge", "Requests on workers.", lambda: [((), self._running())])
        self._read(
            "workers",
            "gauge",
            "Workers joined, by stage and state.",
            lambda: self._workers(),
            {"stage": STAGES, "state": WORKER_STATES},
        )

    def watch(self, waiting: Callable[[], int], running: Callable[[], int], workers: Callable[[], Sampled]) -> None:
        """Where numbers of the moment are read; ``workers`` gives them by stage and state."""
        self._waiting, self._running, self._workers = waiting, running, workers

    def http(self, route: str, status: int) -> None:
        """An HTTP request to ``route`` (a pattern, or "unknown") ended with ``status``."""
        self._http.labels(route, str(status)).inc()

    def accepted(self, prompt_tokens: int, key: str) -> None:
        """A request was taken; ``key`` is the name of its API key, empty without keys."""
        self._prompt.inc(prompt_tokens)
        key = self._key(key)
        self._key_requests.labels(key).inc()
        self._key_tokens.labels(key, "prompt").inc(prompt_tokens)

    def tokens(self, count: int, since_last: float | None, key: str) -> None:
        """``count`` tokens are handed to a client, ``since_last`` seconds after the last ones; None: the first."""
        self._completion.inc(count)
        self._key_tokens.labels(self._key(key), "completion").inc(count)
        if since_last is not None:
            self._itl.observe(since_last)

    @contextmanager
    def refusing(self) -> Iterator[None]:
        """Around what may refuse a request: what it raises is how the request ended."""
        try:
            yield
        except BaseException as error:
            self.ended(error)
            self._refusals.labels(refusal_reason(error)).inc()
            raise

    def attempt_failed(self, error: BaseException) -> None:
        """A decode worker failed a request, which goes on at another or is given up."""
        self._failed_attempts.labels(outcome_of(error)).inc()

    def prefill_again(self, reason: decode_pb2.NeedPrefill.Reason) -> None:
        """A decode worker asked for KV again."""
        name = decode_pb2.NeedPrefill.Reason.Name(reason).lower().rpartition("_")[2]
        self._again.labels(name if name in PREFILL_AGAIN else "failed").inc()

    def scaling(self, targets: ScalingTargets) -> None:
        """What the scaling policy makes of things now."""
        before, self._targets = self._targets, targets
        if before is None:
            return
        for stage, was, now in (
            ("prefill", before.prefill_pool.workers, targets.prefill_pool.workers),
            ("decode", before.decode_pool.workers, targets.decode_pool.workers),
        ):
            if was != now:
                self._scaled.labels(stage, "up" if now > was else "down").inc()

    def _scaling(self, values: Callable[[PoolTarget], Sampled]) -> Sampled:
        targets = self._targets
        if targets is None:
            return []
        pools = (("prefill", targets.prefill_pool), ("decode", targets.decode_pool))
        return [((stage, *labels), value) for stage, pool in pools for labels, value in values(pool)]

    def ended(self, error: BaseException | None) -> None:
        """A request ended, with ``error`` or well."""
        self._requests.labels(outcome_of(error)).inc()

    def answered(self, finished: inference_pb2.Finished) -> None:
        """An answer is complete."""
        timing, usage = finished.timing, finished.usage
        total = timing.total_ns / 1e9
        self._total.observe(total)
        self._cached.inc(usage.cached_tokens)
        self._migrations.inc(finished.migrations)
        if not timing.HasField("ttft_ns"):
            return
        ttft = left = timing.ttft_ns / 1e9
        self._ttft.observe(ttft)
        for part in TTFT_PARTS[:-1]:
            seconds = getattr(timing, f"{part}_ns") / 1e9
            left -= seconds
            self._parts.labels(part).observe(seconds)
        self._parts.labels("unattributed").observe(max(0.0, left))
        if usage.completion_tokens > 1:
            self._tpot.observe((total - ttft) / (usage.completion_tokens - 1))

    def worker_lost(self, stage: str) -> None:
        """A worker left that was not draining."""
        self._lost.labels(stage).inc()

    def _key(self, key: str) -> str:
        if not key:
            return "none"
        if key not in self._keys and len(self._keys) >= MAX_KEY_SERIES:
            return "other"
        self._keys.add(key)
        return key


class EngineMetrics(MetricSet):
    """What both kinds of worker count. ``step``, ``step_failed`` on the engine's thread, the rest on the event loop."""

    def __init__(self, stage: str) -> None:
        super().__init__(stage)
        self._load: Callable[[], EngineNumbers] | None = None
        self._step = self._histogram("step_seconds", "One step of the model.", LATENCY_BUCKETS)
        self._batch = self._histogram("batch_size", "Sequences in a step.", BATCH_BUCKETS)
        self._step_failures = self._counter("step_failures_total", "Steps that failed, with all their sequences.")

        gauge = self._gauge
        gauge("running", "Sequences being computed or handed over.", lambda n: n.running)
        gauge("waiting", "Sequences taken that are not computed yet.", lambda n: n.waiting)
        gauge("kv_blocks", "Blocks of the KV cache.", lambda n: n.blocks_total)
        gauge("kv_blocks_used", "Blocks referenced by live requests, reserved ones included.", lambda n: n.blocks_used)
        gauge("kv_blocks_cached", "Blocks not referenced that hold prefixes.", lambda n: n.blocks_cached)
        gauge("kv_blocks_free", "Blocks that hold nothing.", lambda n: n.blocks_total - n.blocks_used - n.blocks_cached)
        gauge("kv_blocks_reserved", "Used blocks of prompts whose KV is not all there.", lambda n: n.blocks_reserved)
        gauge("kv_blocks_leaked", "Blocks that are nobody's and not free; must be 0.", lambda n: n.blocks_leaked)
        self._read(
            "prefix_tokens_total",
            "counter",
            "Prompt tokens given blocks, by whether the prefix cache had their KV.",
            lambda: [] if self._load is None else _hits(self._load()),
            {"result": ("hit", "miss")},
        )

    def watch(self, load: Callable[[], EngineNumbers]) -> None:
        """Where the engine's numbers are read."""
        self._load = load

    def _gauge(self, what: str, help: str, value: Callable[[EngineNumbers], int]) -> None:
        def read() -> Sampled:
            return [] if self._load is None else [((), value(self._load()))]

        self._read(what, "gauge", help, read)

    def step_failed(self) -> None:
        self._step_failures.inc()


class PrefillMetrics(EngineMetrics):
    """What a prefill worker counts."""

    def __init__(self) -> None:
        super().__init__("prefill")
        self._tokens = self._histogram("batch_tokens", "Prompt tokens in a step.", TOKEN_BUCKETS)
        self._prompts = self._counter("prompts_total", "Prompts that have ended, by how.", {"outcome": OUTCOMES})
        self._queue = self._histogram("queue_seconds", "Prompt received to its first chunk scheduled.", LATENCY_BUCKETS)
        self._compute = self._histogram(
            "compute_seconds", "First chunk scheduled to first token sampled.", LATENCY_BUCKETS
        )
        self._gauge("queued_tokens", "Prompt tokens taken and not computed.", lambda n: n.queued_tokens)

    def step(self, seconds: float, sequences: int, tokens: int) -> None:
        self._step.observe(seconds)
        self._batch.observe(sequences)
        self._tokens.observe(tokens)

    def scheduled(self, queue_seconds: float) -> None:
        self._queue.observe(queue_seconds)

    def computed(self, compute_seconds: float) -> None:
        self._compute.observe(compute_seconds)

    @contextmanager
    def prompt(self) -> Iterator[None]:
        """Around all that is done for one prompt, refusing it included."""
        try:
            yield
        except BaseException as error:
            self._prompts.labels(outcome_of(error)).inc()
            raise
        self._prompts.labels("ok").inc()


class DecodeMetrics(EngineMetrics):
    """What a decode worker counts."""

    REFUSALS = ("sequences", "preempted", "blocks")

    def __init__(self) -> None:
        super().__init__("decode")
        counter, histogram, codec = self._counter, self._histogram, {"codec": tuple(CODECS)}
        self._tokens = counter("tokens_total", "Tokens computed by the decoder.")
        self._replayed = counter("replayed_tokens_total", "Tokens run again after a move or a preemption.")
        self._preemptions = counter("preemptions_total", "Sequences that lost their blocks to older ones.")
        self._refusals = counter(
            "refusals_total",
            "Sequences refused: too many sequences, preempted ones come first, or too few blocks.",
            {"reason": self.REFUSALS},
        )
        self._sequences = counter("sequences_total", "Attempts that have ended, by how.", {"outcome": OUTCOMES})
        self._reservation = histogram(
            "reservation_seconds", "Sequence received to its blocks reserved.", LATENCY_BUCKETS
        )
        self._handoff = histogram(
            "handoff_seconds", "Prompt sent to a prefill worker to all its KV here.", LATENCY_BUCKETS, codec
        )
        self._transfer = histogram(
            "kv_transfer_seconds", "First KV of a prompt here to the last.", LATENCY_BUCKETS, codec
        )
        self._exposed = histogram(
            "handoff_exposed_seconds", "First token known to the first decode step.", LATENCY_BUCKETS
        )
        self._bytes = counter("kv_received_bytes_total", "KV received, by codec and by the way it took.",
            {**codec, "path": ("socket", "shared")})  # fmt: skip
        self._failures = counter("handoff_failures_total", "Handoffs that failed, by how.", {"reason": OUTCOMES[1:]})
        self._broken = counter("broken_streams_total", "Data streams that broke and were begun anew.")

    def step(self, seconds: float, sequences: int, tokens: int, replayed: int) -> None:
        """A step computed ``tokens`` new tokens and ran ``replayed`` known ones again."""
        self._step.observe(seconds)
        self._batch.observe(sequences)
        self._tokens.inc(tokens)
        if replayed:
            self._replayed.inc(replayed)

    def preempted(self) -> None:
        self._preemptions.inc()

    def refused(self, reason: str) -> None:
        self._refusals.labels(reason).inc()

    def reserved(self, seconds: float) -> None:
        self._reservation.observe(seconds)

    def handed_over(self, codec: common_pb2.KvCodec, pull: PullNumbers) -> None:
        """All of a prompt's KV is here."""
        name = CODEC_NAMES[codec]
        self._handoff.labels(name).observe(pull.last_kv_ns / 1e9)
        self._transfer.labels(name).observe((pull.last_kv_ns - pull.first_kv_ns) / 1e9)

    def received(self, codec: common_pb2.KvCodec, pull: PullNumbers) -> None:
        """A handoff has ended, however."""
        name = CODEC_NAMES[codec]
        self._bytes.labels(name, "socket").inc(pull.kv_bytes - pull.shared_bytes)
        self._bytes.labels(name, "shared").inc(pull.shared_bytes)
        self._broken.inc(pull.broken_streams)

    def handoff_failed(self, error: BaseException) -> None:
        self._failures.labels(outcome_of(error)).inc()

    def exposed(self, seconds: float) -> None:
        self._exposed.observe(seconds)

    def ended(self, error: BaseException | None) -> None:
        """An attempt ended."""
        self._sequences.labels(outcome_of(error)).inc()


def _hits(load: EngineNumbers) -> Sampled:
    found = load.prefix_tokens_found
    return [(("hit",), found), (("miss",), load.prefix_tokens_looked_up - found)]


def declared() -> list[Spec]:
    """Every metric of ours, by process and then in the order of declaration; ``build_info`` comes once."""
    sets = (RouterMetrics(), PrefillMetrics(), DecodeMetrics())
    return list({spec.name: spec for each in sets for spec in each.specs}.values())

"""The metrics of workers, and the list of every metric that the services export. No torch; knows no service.

The reference (docs/reference/metrics.md) lists the declarations here and in ``router_metrics``. A name is
``overfill_<stage>_<what>_<unit>``. A label has few values. Series of known values exist from the start, so that a rate
includes their first increase. Numbers that an engine keeps anyway are read at each scrape.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

from overfill.request.names import CODEC_NAMES, CODECS, KV_SOURCES
from overfill.telemetry.engine_load import EngineLoad
from overfill.telemetry.metric_set import (
    BATCH_BUCKETS,
    LATENCY_BUCKETS,
    TOKEN_BUCKETS,
    Labels,
    MetricSet,
    Sampled,
    Spec,
)
from overfill.telemetry.outcomes import OUTCOMES, outcome_of
from overfill.telemetry.router_metrics import RouterMetrics
from overfill.v1 import common_pb2


class PullNumbers(Protocol):
    """Numbers of a handoff (``kv.receiver.PullStats``): bytes, and nanoseconds since the decode worker requested it."""

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


class EngineMetrics(MetricSet):
    """Metrics of both kinds of worker. ``step`` and ``step_failed`` run on the engine's thread, others on the loop."""

    def __init__(self, stage: str, beside: MetricSet | None = None) -> None:
        super().__init__(stage, beside)
        self._load: Callable[[], EngineLoad] | None = None
        self._step = self._histogram("step_seconds", "Duration of one step of the model.", LATENCY_BUCKETS)
        self._batch = self._histogram("batch_size", "Sequences in one step.", BATCH_BUCKETS)
        self._step_failures = self._counter(
            "step_failures_total", "Steps that failed; all sequences in a failed step fail."
        )

        gauge = self._gauge
        gauge("running", "Sequences being computed or handed over.", lambda n: n.running)
        gauge("waiting", "Accepted sequences that are not being computed yet.", lambda n: n.waiting)
        gauge("kv_blocks", "Total blocks of the KV cache.", lambda n: n.blocks_total)
        gauge("kv_blocks_used", "Blocks referenced by live requests, including reserved ones.", lambda n: n.blocks_used)
        gauge("kv_blocks_cached", "Unreferenced blocks that hold cached prefixes.", lambda n: n.blocks_cached)
        gauge("kv_blocks_free", "Empty blocks.", lambda n: n.blocks_total - n.blocks_used - n.blocks_cached)
        gauge("kv_blocks_reserved", "Used blocks of prompts whose KV is incomplete.", lambda n: n.blocks_reserved)
        gauge("kv_blocks_leaked", "Blocks that are neither free nor owned; must be 0.", lambda n: n.blocks_leaked)
        self._read(
            "prefix_tokens_total",
            "counter",
            "Prompt tokens that got blocks, by whether the prefix cache had their KV.",
            lambda: [] if self._load is None else _hits(self._load()),
            {"result": ("hit", "miss")},
        )
        self._lent = self._counter("lent_tokens_total", "Tokens whose KV was lent to other workers.")

    def watch(self, load: Callable[[], EngineLoad]) -> None:
        """Sets the function that returns the engine's load at each scrape."""
        self._load = load

    def lent(self, tokens: int) -> None:
        """Counts a loan of the KV of ``tokens`` tokens, without those that the borrower had before."""
        self._lent.inc(tokens)

    def _gauge(self, what: str, help: str, value: Callable[[EngineLoad], int]) -> None:
        def read() -> Sampled:
            return [] if self._load is None else [((), value(self._load()))]

        self._read(what, "gauge", help, read)

    def step_failed(self) -> None:
        self._step_failures.inc()


class PrefillMetrics(EngineMetrics):
    """Metrics of a prefill worker.

    Attributes:
        disk: metrics of its KV on disk.
    """

    def __init__(self) -> None:
        super().__init__("prefill")
        self._tokens = self._histogram("batch_tokens", "Prompt tokens in one step.", TOKEN_BUCKETS)
        self._prompts = self._counter("prompts_total", "Prompts that have ended, by outcome.", {"outcome": OUTCOMES})
        self._queue = self._histogram(
            "queue_seconds", "Time from receiving a prompt to scheduling its first chunk.", LATENCY_BUCKETS
        )
        self._compute = self._histogram(
            "compute_seconds",
            "Time from scheduling a prompt's first chunk to the end of its computation, with or without a first token.",
            LATENCY_BUCKETS,
        )
        self._gauge("queued_tokens", "Accepted prompt tokens that are not computed yet.", lambda n: n.queued_tokens)
        source: Labels = {"source": KV_SOURCES[1:]}
        self._imports = self._counter(
            "imports_total",
            "Attempts to import a prompt's KV from another worker (peer) or from disk, by outcome; none means that the "
            "source had no more than the prefix cache.",
            {**source, "outcome": (OUTCOMES[0], "none", *OUTCOMES[1:])},
        )
        self._imported = self._counter(
            "imported_tokens_total", "Prompt tokens whose KV was imported instead of computed, by source.", source
        )
        self._import = self._histogram("import_seconds", "Duration of an import.", LATENCY_BUCKETS, source)
        self.disk = DiskMetrics(self)

    def imported(self, source: str, outcome: str, tokens: int, seconds: float) -> None:
        """Records an attempt to import KV of one prompt from one source, successful or not.

        Args:
            source: "peer" or "disk".
            outcome: one of ``OUTCOMES``. Tokens may be in place with any of them.
            tokens: prompt tokens whose KV is now in place.
        """
        self._imports.labels(source, "none" if outcome == "ok" and not tokens else outcome).inc()
        self._imported.labels(source).inc(tokens)
        self._import.labels(source).observe(seconds)

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
        """Counts a prompt with its outcome, including a refused one. Wraps all work for it."""
        try:
            yield
        except BaseException as error:
            self._prompts.labels(outcome_of(error)).inc()
            raise
        self._prompts.labels("ok").inc()


class DiskMetrics(MetricSet):
    """Metrics of a prefill worker's KV on disk. Any thread may call the methods.

    Args:
        worker: metrics of the worker, which list these too.
    """

    ERRORS = ("folder", "read", "write", "damaged")

    def __init__(self, worker: MetricSet) -> None:
        super().__init__("prefill", worker)
        self.specs = worker.specs
        self._used: Callable[[], int] | None = None
        self._read(
            "kv_disk_used_bytes",
            "gauge",
            "Bytes of KV in the worker's folder; absent without one.",
            lambda: [] if self._used is None else [((), self._used())],
        )
        self._bytes_read = self._counter("kv_disk_read_bytes_total", "Bytes of KV read from disk.")
        self._written = self._counter("kv_disk_written_bytes_total", "Bytes of KV written to disk.")
        self._dropped = self._counter(
            "kv_disk_dropped_blocks_total", "Blocks that were not written, because the disk was too slow."
        )
        self._evicted = self._counter("kv_disk_evicted_blocks_total", "Least recently used blocks deleted from disk.")
        self._errors = self._counter(
            "kv_disk_errors_total",
            "Errors of KV on disk: a folder that the worker cannot use, failed reads and writes, damaged blocks. "
            "The worker computes such KV.",
            {"kind": self.ERRORS},
        )

    def watch(self, used_bytes: Callable[[], int]) -> None:
        """Sets the function that returns the bytes in the folder at each scrape."""
        self._used = used_bytes

    def read(self, nbytes: int) -> None:
        """Counts bytes read from disk."""
        self._bytes_read.inc(nbytes)

    def written(self, nbytes: int) -> None:
        """Counts bytes written to disk."""
        self._written.inc(nbytes)

    def dropped(self, blocks: int) -> None:
        """Counts blocks that were not written, because too many others waited."""
        self._dropped.inc(blocks)

    def evicted(self, blocks: int) -> None:
        """Counts blocks that were deleted because the folder was full."""
        self._evicted.inc(blocks)

    def failed(self, kind: str) -> None:
        """Counts an error; ``kind`` is one of ``ERRORS``."""
        self._errors.labels(kind).inc()


class DecodeMetrics(EngineMetrics):
    """Metrics of a decode worker.

    Args:
        beside: metrics of the prefill stage of a worker with both.
    """

    REFUSALS = ("sequences", "preempted", "blocks", "adapter")

    def __init__(self, beside: PrefillMetrics | None = None) -> None:
        super().__init__("decode", beside)
        counter, histogram, codec = self._counter, self._histogram, {"codec": tuple(CODECS)}
        self._tokens = counter("tokens_total", "Tokens computed by the decoder.")
        self._replayed = counter(
            "replayed_tokens_total", "Known tokens computed again after a migration or preemption."
        )
        self._prompt_tokens = counter(
            "prompt_tokens_computed_total",
            "Prompt tokens that the decoder computed instead of the full model; must be 0.",
        )
        self._preemptions = counter("preemptions_total", "Sequences whose blocks were given to older sequences.")
        self._refusals = counter(
            "refusals_total",
            "Refused sequences, by reason: too many sequences, preempted sequences waiting, too few blocks, or an "
            "empty adapter slot.",
            {"reason": self.REFUSALS},
        )
        self._sequences = counter("sequences_total", "Attempts that have ended, by outcome.", {"outcome": OUTCOMES})
        self._reservation = histogram(
            "reservation_seconds", "Time from receiving a sequence to reserving its blocks.", LATENCY_BUCKETS
        )
        self._handoff = histogram(
            "handoff_seconds",
            "Time from sending a prompt to a prefill worker to having all of its KV.",
            LATENCY_BUCKETS,
            codec,
        )
        self._local = counter(
            "local_prefills_total", "Prompts that the worker prefilled itself, because it has both stages."
        )
        self._shared = counter(
            "shared_prompts_total",
            "Prompts without a transfer of their own: their KV was cached, or came for another sequence.",
            {"from": ("cache", "transfer")},
        )
        self._shared_tokens = counter("shared_prompt_tokens_total", "Tokens of these prompts before answer_start.")
        self._transfer = histogram(
            "kv_transfer_seconds", "Time from a prompt's first KV to its last.", LATENCY_BUCKETS, codec
        )
        self._exposed = histogram(
            "handoff_exposed_seconds",
            "Time from a sequence's first token, or its computed prompt if the decoder samples that token, to its "
            "first decode step.",
            LATENCY_BUCKETS,
        )
        self._bytes = counter("kv_received_bytes_total", "Bytes of KV received, by codec and path.",
            {**codec, "path": ("socket", "shared")})  # fmt: skip
        self._failures = counter("handoff_failures_total", "Failed handoffs, by outcome.", {"reason": OUTCOMES[1:]})
        self._broken = counter("broken_streams_total", "Data streams that broke and were reopened.")

    def step(self, seconds: float, sequences: int, tokens: int, replayed: int) -> None:
        """Records a step that computed ``tokens`` new tokens and recomputed ``replayed`` known ones."""
        self._step.observe(seconds)
        self._batch.observe(sequences)
        self._tokens.inc(tokens)
        if replayed:
            self._replayed.inc(replayed)

    def prompt_tokens_computed(self, tokens: int) -> None:
        self._prompt_tokens.inc(tokens)

    def preempted(self) -> None:
        self._preemptions.inc()

    def refused(self, reason: str) -> None:
        self._refusals.labels(reason).inc()

    def reserved(self, seconds: float) -> None:
        self._reservation.observe(seconds)

    def handed_over(self, codec: common_pb2.KvCodec, pull: PullNumbers) -> None:
        """Records a handoff that has delivered all of a prompt's KV."""
        name = CODEC_NAMES[codec]
        self._handoff.labels(name).observe(pull.last_kv_ns / 1e9)
        self._transfer.labels(name).observe((pull.last_kv_ns - pull.first_kv_ns) / 1e9)

    def prefilled_here(self) -> None:
        """Counts a prompt that this worker has prefilled for a sequence of its own."""
        self._local.inc()

    def shared(self, source: str, tokens: int) -> None:
        """Counts a prompt of ``tokens`` whose KV came from the "cache", or from another sequence's "transfer"."""
        self._shared.labels(source).inc()
        self._shared_tokens.inc(tokens)

    def received(self, codec: common_pb2.KvCodec, pull: PullNumbers) -> None:
        """Counts the bytes and broken streams of a handoff that has ended, successfully or not."""
        name = CODEC_NAMES[codec]
        self._bytes.labels(name, "socket").inc(pull.kv_bytes - pull.shared_bytes)
        self._bytes.labels(name, "shared").inc(pull.shared_bytes)
        self._broken.inc(pull.broken_streams)

    def handoff_failed(self, error: BaseException) -> None:
        self._failures.labels(outcome_of(error)).inc()

    def exposed(self, seconds: float) -> None:
        self._exposed.observe(seconds)

    def ended(self, error: BaseException | None) -> None:
        """Counts an attempt that has ended; ``error`` is None after success."""
        self._sequences.labels(outcome_of(error)).inc()


def _hits(load: EngineLoad) -> Sampled:
    found = load.prefix_tokens_found
    return [(("hit",), found), (("miss",), load.prefix_tokens_looked_up - found)]


def declared() -> list[Spec]:
    """Returns every metric by service, in the order of declaration; ``build_info`` appears once."""
    sets = (RouterMetrics(), PrefillMetrics(), DecodeMetrics())
    return list({spec.name: spec for each in sets for spec in each.specs}.values())

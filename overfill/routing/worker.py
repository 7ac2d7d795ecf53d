"""One worker of a pool: its Hello, its latest report, and the requests that this router has placed on it since.

A worker with both stages is a member of two pools, with a ``Worker`` in each.

Calls that depend on time take ``now`` (seconds, monotonic).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from google.protobuf.message import Message

from overfill.errors import Incompatible, InvalidRequest
from overfill.kv.handshake import MOCK_READER, KvIdentity, data_address_fault
from overfill.kv.spec import DTYPE_FROM_PROTO
from overfill.routing.tier import Adapter
from overfill.rpc.constants import MAX_NAME_LENGTH, MAX_STARTUP
from overfill.v1 import common_pb2, kv_pb2, registry_pb2

PREFILL = common_pb2.STAGE_PREFILL
DECODE = common_pb2.STAGE_DECODE

STAGE_NAMES = {PREFILL: "prefill", DECODE: "decode"}

STALE_AFTER = 3.0
"""Seconds without a report after which the router places no requests on a worker. A report is due every second."""

DEFAULT_IMPORT_COST = 0.1
"""Time to import KV of a token, from a peer or from disk, as a part of the time to compute it; while it is unknown."""

_MAXIMA = {"max_model_len": 1 << 30, "vocab_size": 1 << 30, "max_num_seqs": 1 << 20, "startup_seconds": MAX_STARTUP}
"""Maximum of each number in a Hello. Requests wait for absent workers as long as these take to start."""


@dataclass(frozen=True, slots=True)
class WorkerInfo:
    """One stage of a worker, as the worker describes it in its Hello; fixed for one incarnation.

    ``startup_seconds`` runs from the import of ``overfill`` until the worker was ready, without the preparation of a
    pair. 0 means unknown. ``data_addresses`` is as in ``Hello``. ``engine`` is for people; empty means unknown.

    Attributes:
        max_num_seqs: maximum number of requests that the stage runs at once, of all routers; 0 means unknown.
        colocated: the worker has the other stage too, and another ``WorkerInfo`` for it.
        tier: decode workers: name of its tier; empty until the roster has found the stack's only one.
        decoder: decode workers: what decides which tokens the worker writes, by field of ``ModelIdentity``.
        adapters: decode workers: the adapters that were loaded when the worker joined, unchecked.
        lends_kv: the stage lends the KV that it reports to workers that prefill; one that prefills borrows as well.
    """

    id: str
    incarnation: int
    stage: common_pb2.Stage
    address: str
    data_addresses: tuple[kv_pb2.DataAddress, ...]
    identity: KvIdentity
    max_model_len: int
    vocab_size: int
    startup_seconds: float = 0.0
    max_num_seqs: int = 0
    engine: str = ""
    colocated: bool = False
    tier: str = ""
    decoder: Mapping[str, object] = field(default_factory=dict)
    adapters: tuple[common_pb2.Adapter, ...] = ()
    lends_kv: bool = False

    @classmethod
    def from_hello(cls, hello: registry_pb2.Hello) -> tuple[WorkerInfo, ...]:
        """Converts a Hello: one description for each stage of the worker, prefill first.

        Raises:
            InvalidRequest: a field is missing, invalid or out of bounds.
            Incompatible: a decode worker lends KV, and its decoder is not the reader.
        """
        _check_bounds(hello)
        stages = _stages(hello)
        if hello.lends_kv and PREFILL not in stages:
            _check_lent(hello.model)
        if hello.kv.dtype not in DTYPE_FROM_PROTO:
            raise InvalidRequest("hello.kv.dtype", f"unknown element type {hello.kv.dtype}")
        one = cls(
            id=hello.worker_id,
            incarnation=hello.incarnation,
            stage=stages[0],
            address=hello.address,
            data_addresses=tuple(hello.data_addresses),
            identity=KvIdentity.from_proto(hello.wire_version, hello.model, hello.kv),
            max_model_len=hello.max_model_len,
            max_num_seqs=hello.max_num_seqs,
            vocab_size=hello.vocab_size,
            startup_seconds=hello.startup_seconds,
            engine=hello.engine,
            colocated=len(stages) > 1,
            lends_kv=hello.lends_kv,
        )
        as_decode = replace(
            one,
            stage=DECODE,
            tier=hello.tier,
            decoder=_decoder(hello.model),
            adapters=tuple(hello.adapters),
            lends_kv=hello.lends_kv and not one.colocated,  # with both stages, its reports are of the prefill stage
        )
        return tuple(as_decode if stage == DECODE else one for stage in stages)


def _check_bounds(hello: registry_pb2.Hello) -> None:
    if hello.data_addresses and (fault := data_address_fault(hello.data_addresses, hello.kv.num_kv_heads)):
        raise InvalidRequest("hello.data_addresses", fault)
    for name in ("worker_id", "address"):
        if not getattr(hello, name):
            raise InvalidRequest(f"hello.{name}", "is empty")
    texts = {f"hello.{name}": text for name, text in _texts(hello).items()}
    texts |= {f"hello.model.{name}": text for name, text in _texts(hello.model).items()}
    for name, text in texts.items():
        if len(text) > MAX_NAME_LENGTH or not text.isprintable():
            raise InvalidRequest(
                name,
                f"must be at most {MAX_NAME_LENGTH} printable characters; got {len(text)}, which begin {text[:40]!r}",
            )
    for name, most in _MAXIMA.items():
        if not 0 <= (number := getattr(hello, name)) <= most:
            raise InvalidRequest(f"hello.{name}", f"must be from 0 to {most:.0f}; got {number}")


def _check_lent(model: common_pb2.ModelIdentity) -> None:
    """Raises Incompatible unless a decode worker computes what the reader would."""
    same_weights = model.decoder_digest == (
        model.full_digest if model.reader_digest == MOCK_READER else model.reader_digest
    )
    same_precision = (model.decoder_quantize or "none") == (model.reader_quantize or "none")
    if not (model.decoder_digest and same_weights and same_precision and model.kv_cache_dtype in ("", "auto")):
        raise Incompatible("a decode worker lends KV only if its decoder is the reader of prompts", ["hello.lends_kv"])


def _texts(message: Message) -> dict[str, str]:
    """The fields of ``message`` that are set and are text, by name."""
    return {field.name: value for field, value in message.ListFields() if isinstance(value, str)}


def _stages(hello: registry_pb2.Hello) -> list[common_pb2.Stage]:
    stages = sorted(hello.stages)
    if not stages or len(set(stages)) < len(stages) or not set(stages) <= {PREFILL, DECODE}:
        raise InvalidRequest("hello.stages", f"must name prefill, decode or both, each once; got {list(hello.stages)}")
    return stages


def _decoder(model: common_pb2.ModelIdentity) -> dict[str, object]:
    return {
        "decoder_digest": model.decoder_digest,
        "decoder_config_digest": model.decoder_config_digest,
        "decoder_quantize": model.decoder_quantize or "none",
        "kv_cache_dtype": model.kv_cache_dtype or "auto",
    }


@dataclass(eq=False, slots=True)
class Worker:
    """One incarnation of a worker in one pool.

    ``set_report`` copies the latest report's numbers: a placement reads them often, and a message's fields are slow to
    read. They are 0 and False before the first report.

    Attributes:
        report: latest report, or None before the first; ``set_report`` replaces it.
        ready: the worker has loaded and warmed up, by its latest report.
        draining: the worker has reported that it drains. It never takes work again.
        block_size: tokens per block.
        reported_at: arrival time of the latest report, seconds.
        in_flight: number of requests that this router has on the worker now.
        paused_until_report: True after the worker refused or failed a request. The router places nothing on it until
            its next report.
        placed: number of requests placed since the latest report, which does not count them yet.
        placed_tokens, placed_blocks: tokens of those requests that the worker probably computes, and blocks they need.
        last_placed: ordinal of the latest placement in the pool; 0 before the first.
        answers: number of placements that the worker has answered: it reserved blocks or refused.
        adapters: the adapters that requests may have on the worker, by name; ``Adapters`` sets them.
        prefix_keys: keys of the blocks in the worker's prefix cache (``kv.keys.block_key``), as last reported.
        disk_keys: keys of the blocks that the worker has on disk, as last reported.
        peer_cost, disk_cost: time to import KV of a token, as a part of the time to compute it; at most 1.
        named: number of prompts since the latest report for which the router has named the worker as a holder.
        silent: True once the worker has not reported for ``STALE_AFTER``.
    """

    info: WorkerInfo
    report: registry_pb2.Report | None = None
    reported_at: float = 0.0
    in_flight: int = 0
    paused_until_report: bool = False
    placed: int = 0
    placed_tokens: int = 0
    placed_blocks: int = 0
    last_placed: int = 0
    answers: int = 0
    adapters: dict[str, Adapter] = field(default_factory=dict)
    prefix_keys: set[int] = field(default_factory=set)
    disk_keys: set[int] = field(default_factory=set)
    peer_cost: float = DEFAULT_IMPORT_COST
    disk_cost: float = DEFAULT_IMPORT_COST
    named: int = 0
    silent: bool = False
    ready: bool = False
    draining: bool = False
    block_size: int = 0
    _credits: int = 0
    _total_blocks: int = 0
    _used_blocks: int = 0
    _reported_requests: int = 0
    _reported_tokens: int = 0  # prompt tokens that are queued

    def set_report(self, report: registry_pb2.Report | None) -> None:
        """Replaces the latest report. The router counts the placements since then anew."""
        self.report = report
        self.placed = self.placed_tokens = self.placed_blocks = self.named = 0
        report = report or registry_pb2.Report()
        load = report.load
        self.ready, self.draining, self._credits = report.ready, report.draining, report.credits
        self._total_blocks, self._used_blocks = load.kv_blocks_total, load.kv_blocks_used
        self.block_size = load.block_size
        self._reported_requests, self._reported_tokens = load.running + load.waiting, load.queued_tokens
        if report.HasField("costs"):
            costs = report.costs
            self.peer_cost = _import_cost(costs.peer_ns, costs.compute_ns)
            self.disk_cost = _import_cost(costs.disk_ns, costs.compute_ns)

    @property
    def id(self) -> str:
        return self.info.id

    @property
    def credits_left(self) -> int:
        """Number of requests that this router may still place on the worker; 0 before the first report."""
        return max(0, self._credits - self.in_flight)

    @property
    def process(self) -> tuple[str, int]:
        """Id and incarnation. A restarted worker counts as a different one."""
        return self.info.id, self.info.incarnation

    @property
    def seat(self) -> tuple[str, int, common_pb2.Stage]:
        """``process`` and stage: one stage of a worker with both may fail while the other one serves."""
        return *self.process, self.info.stage

    @property
    def starting(self) -> bool:
        """True while the worker is not ready yet: its latest report says so, or none has arrived since it joined."""
        return not self.draining and not self.ready

    def alive(self, now: float) -> bool:
        """True if the worker is ready, not draining, and has reported lately. It may be full."""
        return self.ready and not self.draining and now - self.reported_at <= STALE_AFTER

    @property
    def lends(self) -> bool:
        """True if another worker may borrow KV from this one now. A draining worker still lends."""
        return self.info.lends_kv and self.ready and not self.silent and not self.paused_until_report

    def admissible(self, now: float) -> bool:
        """True if the router may place another request of some size on the worker."""
        return self.alive(now) and not self.paused_until_report and self.credits_left > 0

    @property
    def capacity_tokens(self) -> int | None:
        """Longest sequence that the empty worker can hold, in tokens; None before its first report."""
        if not self._total_blocks:
            return None
        tokens = self._total_blocks * self.block_size
        return min(tokens, self.info.max_model_len) if self.info.max_model_len else tokens

    def has(self, adapter: Adapter | None) -> bool:
        """True if the worker can write with ``adapter``; None means the decoder alone."""
        return adapter is None or self.adapters.get(adapter.name) == adapter

    def could_hold(self, tokens: int) -> bool:
        """True if the empty worker can hold a sequence of ``tokens``, or if its size is unknown."""
        capacity = self.capacity_tokens
        return capacity is None or tokens <= capacity

    def has_room(self, tokens: int) -> bool:
        """True if ``tokens`` fit now, by the latest report and the placements since. Cached blocks count as free."""
        return tokens <= self.room_tokens

    @property
    def room_tokens(self) -> float:
        """Number of tokens that fit now; infinite while that is unknown."""
        if not self._total_blocks or not self.block_size:
            return math.inf
        return (self._total_blocks - self._used_blocks - self.placed_blocks) * self.block_size

    @property
    def requests(self) -> int:
        """Number of requests on the worker as far as this router knows, those of other routers included."""
        return max(self._reported_requests + self.placed, self.in_flight)

    @property
    def queued_tokens(self) -> int:
        """Prompt tokens ahead of a new request (prefill)."""
        return self._reported_tokens + (self.placed_tokens if self.info.stage == PREFILL else 0)

    def blocks(self, tokens: int) -> int:
        """Returns the number of blocks that hold ``tokens``; 0 while the block size is unknown."""
        return -(-tokens // self.block_size) if self.block_size else 0


def _import_cost(import_ns: int, compute_ns: int) -> float:
    return min(1.0, import_ns / compute_ns) if import_ns and compute_ns else DEFAULT_IMPORT_COST

"""What a stack serves and how it is doing, as plain dataclasses. No I/O."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, Literal

from overfill.request.names import CODEC_NAMES
from overfill.v1 import admin_pb2, common_pb2, decode_pb2, inference_pb2

Stage = Literal["router", "prefill", "decode", "unspecified"]
WorkerState = Literal["starting", "ready", "draining", "silent"]


@dataclass(frozen=True, slots=True)
class Model:
    """A model that a router serves; ``dtype`` is that of its KV cache, ``max_model_len`` counts tokens."""

    name: str
    max_model_len: int
    full_digest: str
    decoder_digest: str
    dtype: str

    @classmethod
    def from_proto(cls, message: inference_pb2.Model) -> Model:
        return cls(**{f.name: getattr(message, f.name) for f in fields(cls)})


@dataclass(frozen=True, slots=True)
class WorkerLoad:
    """One worker's load. Blocks hold ``block_size`` tokens each; used and cached ones do not overlap.

    Of the ``prefix_tokens_looked_up`` prompt tokens that were given blocks since the worker started, the KV of
    ``prefix_tokens_found`` was in its prefix cache.
    """

    kv_blocks_used: int
    kv_blocks_cached: int
    kv_blocks_total: int
    running: int
    waiting: int
    block_size: int
    queued_tokens: int
    prefix_tokens_looked_up: int = 0
    prefix_tokens_found: int = 0

    @property
    def prefix_hit_rate(self) -> float | None:
        """Share of prompt tokens found; None before there were any."""
        return self.prefix_tokens_found / self.prefix_tokens_looked_up if self.prefix_tokens_looked_up else None

    @classmethod
    def from_proto(cls, message: decode_pb2.WorkerLoad) -> WorkerLoad:
        return cls(**{f.name: getattr(message, f.name) for f in fields(cls)})


@dataclass(frozen=True, slots=True)
class ModelIdentity:
    """Which pair a worker holds.

    ``decoder_digest`` is empty on prefill workers, ``decoder_quantize`` unless weights are rounded on load, and
    ``kv_cache_dtype`` unless KV is.
    """

    name: str
    full_digest: str
    decoder_digest: str
    tokenizer_digest: str
    decoder_quantize: str
    kv_cache_dtype: str

    @classmethod
    def from_proto(cls, message: common_pb2.ModelIdentity) -> ModelIdentity:
        return cls(**{f.name: getattr(message, f.name) for f in fields(cls)})


@dataclass(frozen=True, slots=True)
class KvShape:
    """The full model's KV cache."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: str
    rope_type: str
    rope_theta: float

    @classmethod
    def from_proto(cls, message: common_pb2.KvSpec) -> KvShape:
        return cls(
            num_layers=message.num_layers,
            num_kv_heads=message.num_kv_heads,
            head_dim=message.head_dim,
            dtype=_name(common_pb2.DType, message.dtype, "DTYPE_"),
            rope_type=message.rope.type,
            rope_theta=message.rope.theta,
        )


@dataclass(frozen=True, slots=True)
class ProcessStatus:
    """One process about itself. Routers have no load, model or kv; only decode workers have a codec.

    ``metrics_address`` is host:port of /metrics, None when there is none.
    """

    id: str
    stage: Stage
    pid: int
    address: str
    ready: bool
    draining: bool
    load: WorkerLoad | None
    software_version: str
    incarnation: int
    model: ModelIdentity | None
    kv: KvShape | None
    codec: str | None
    metrics_address: str | None = None

    @classmethod
    def from_proto(cls, message: admin_pb2.ProcessStatus) -> ProcessStatus:
        return cls(
            id=message.id,
            stage=_stage(message.stage),
            pid=message.pid,
            address=message.address,
            ready=message.ready,
            draining=message.draining,
            load=WorkerLoad.from_proto(message.load) if message.HasField("load") else None,
            software_version=message.software_version,
            incarnation=message.incarnation,
            model=ModelIdentity.from_proto(message.model) if message.HasField("model") else None,
            kv=KvShape.from_proto(message.kv) if message.HasField("kv") else None,
            codec=CODEC_NAMES.get(message.codec),
            metrics_address=message.metrics_address or None,
        )


@dataclass(frozen=True, slots=True)
class WorkerStatus:
    """A worker as the router knows it; ``process`` is None when it did not answer."""

    id: str
    stage: Stage
    address: str
    process: ProcessStatus | None

    @property
    def state(self) -> WorkerState:
        """In a word; "silent" when it did not answer."""
        if self.process is None:
            return "silent"
        if self.process.draining:
            return "draining"
        return "ready" if self.process.ready else "starting"

    @classmethod
    def from_proto(cls, message: admin_pb2.WorkerStatus) -> WorkerStatus:
        process = ProcessStatus.from_proto(message.process) if message.HasField("process") else None
        return cls(message.id, _stage(message.stage), message.address, process)


@dataclass(frozen=True, slots=True)
class Percentiles:
    """How long something took in the last minute, seconds."""

    p50: float
    p90: float
    p99: float


@dataclass(frozen=True, slots=True)
class Activity:
    """What a router does, and what it has seen in the last minute.

    Attributes:
        running, waiting: requests on a decode worker, and those that wait for a worker of either stage.
        tokens_per_second: handed to clients, mean of the last 10 seconds.
        answers: complete in the last minute.
        timing: of those: what ``Timing`` has, ``unattributed``, and ``itl``, the mean time between an answer's tokens.
    """

    running: int
    waiting: int
    tokens_per_second: float
    answers: int
    timing: dict[str, Percentiles]

    @classmethod
    def from_proto(cls, message: admin_pb2.Activity) -> Activity:
        timing = {t.name: Percentiles(t.p50_seconds, t.p90_seconds, t.p99_seconds) for t in message.timing}
        return cls(message.running, message.waiting, message.tokens_per_second, message.answers, timing)


@dataclass(frozen=True, slots=True)
class PoolStatus:
    """How many workers of a stage are ready now, and how many make the stack complete."""

    ready: int
    expected: int


@dataclass(frozen=True, slots=True)
class StackStatus:
    """A router and its workers, or a worker alone.

    Attributes:
        process: the process that was asked.
        workers: of a router, ordered by stage and id.
        complete: of a router: of each stage as many workers are ready now as the stack was started with.
        pools: of a router: the workers of each stage, counted.
        http_address: of a router: host:port of the OpenAI endpoint; None when there is none.
        activity: of a router.
    """

    process: ProcessStatus
    workers: tuple[WorkerStatus, ...]
    complete: bool
    http_address: str | None
    activity: Activity | None = None
    pools: dict[Stage, PoolStatus] = field(default_factory=dict)

    @property
    def serving(self) -> bool:
        """Whether a request could be answered now: by a router with a ready worker of each stage, or by this worker."""
        return self.process.ready and all(pool.ready for pool in self.pools.values())

    @classmethod
    def from_proto(cls, message: admin_pb2.StatusResponse) -> StackStatus:
        pools = {_stage(pool.stage): PoolStatus(pool.ready, pool.expected) for pool in message.pools}
        return cls(
            process=ProcessStatus.from_proto(message.process),
            workers=tuple(WorkerStatus.from_proto(worker) for worker in message.workers),
            complete=message.complete,
            http_address=message.http_address or None,
            activity=Activity.from_proto(message.activity) if message.HasField("activity") else None,
            pools=pools,
        )


def _stage(value: int) -> Stage:
    return _name(common_pb2.Stage, value, "STAGE_")  # type: ignore[return-value]


def _name(enum: Any, value: int, prefix: str) -> str:
    """Lower-case name without ``prefix``; a newer peer's unknown value is "unspecified"."""
    name: str = enum.Name(value if value in enum.values() else 0)
    return name.removeprefix(prefix).lower()

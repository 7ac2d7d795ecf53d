"""Status of a stack and its models, as plain dataclasses. No I/O."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from overfill.request.messages import shared_fields
from overfill.request.names import CODEC_NAMES, cached_by_source
from overfill.rpc.addresses import instead_of_wildcard, target_host
from overfill.v1 import admin_pb2, common_pb2, decode_pb2, inference_pb2

Stage = Literal["router", "prefill", "decode", "unspecified"]
ProcessState = Literal["starting", "ready", "draining", "silent"]


@dataclass(frozen=True, slots=True)
class Model:
    """A model that a router serves.

    Attributes:
        name: Name that requests may give.
        max_model_len: Maximum tokens of prompt and answer together.
        full_digest: SHA-256 of the full model's tensors, in hexadecimal.
        decoder_digest: SHA-256 of the decoder's tensors.
        dtype: Element type of the KV cache, such as "bfloat16".
        tier: Tier that answers under this name.
        adapter_digest: Digest of the adapter that answers, on the tier's decoder; empty without one.
    """

    name: str
    max_model_len: int
    full_digest: str
    decoder_digest: str
    dtype: str
    tier: str = ""
    adapter_digest: str = ""

    @classmethod
    def from_proto(cls, message: inference_pb2.Model) -> Model:
        return cls(**shared_fields(cls, message))


@dataclass(frozen=True, slots=True)
class WorkerLoad:
    """Load of one worker, in one of its stages.

    Attributes:
        kv_blocks_used: Number of KV blocks that live requests use.
        kv_blocks_cached: Number of other blocks that hold prefixes, and can be evicted.
        kv_blocks_total: Number of all blocks.
        running: Number of sequences that are computed or handed over.
        waiting: Number of sequences accepted and not yet scheduled.
        block_size: Tokens per block.
        queued_tokens: Prompt tokens accepted and not yet computed; 0 on decode workers.
        prefix_tokens_looked_up: Number of prompt tokens that were given blocks since the worker started.
        prefix_tokens_found: Number of those whose KV was in the prefix cache.
        kv_disk_bytes: Bytes of KV that a prefill worker has on disk; 0 without a folder for it.
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
    kv_disk_bytes: int = 0

    @property
    def prefix_hit_rate(self) -> float | None:
        """Share of prompt tokens found in the prefix cache; None before the first prompt."""
        return self.prefix_tokens_found / self.prefix_tokens_looked_up if self.prefix_tokens_looked_up else None

    @classmethod
    def from_proto(cls, message: decode_pb2.WorkerLoad) -> WorkerLoad:
        return cls(**shared_fields(cls, message))


@dataclass(frozen=True, slots=True)
class ModelIdentity:
    """The model pair that a worker holds. Digests are SHA-256 in hexadecimal.

    Attributes:
        name: Name of the model.
        full_digest: Digest of the full model.
        decoder_digest: Digest of the decoder; empty on prefill workers.
        tokenizer_digest: Digest of tokenizer.json.
        decoder_quantize: Format to which the decoder's weights are rounded on load, such as "int8"; empty means none.
        kv_cache_dtype: Format in which a decode worker holds KV, such as "int8"; empty means the dtype that travels.
        config_digest: Digest of the full model's config.
        decoder_config_digest: Digest of the decoder's config and layer map; empty on prefill workers.
        reader_digest: Digest of the weights that compute prompt KV; today that of the full model.
        reader_quantize: Format to which these weights are rounded on load; empty means none.
        revision: Revision of the pair; empty in a stack without revisions.
    """

    name: str
    full_digest: str
    decoder_digest: str
    tokenizer_digest: str
    decoder_quantize: str
    kv_cache_dtype: str
    config_digest: str = ""
    decoder_config_digest: str = ""
    reader_digest: str = ""
    reader_quantize: str = ""
    revision: str = ""

    @classmethod
    def from_proto(cls, message: common_pb2.ModelIdentity) -> ModelIdentity:
        return cls(**shared_fields(cls, message))


@dataclass(frozen=True, slots=True)
class KvShape:
    """Shape and dtype of the full model's KV cache. Per layer, K and V have ``[tokens, num_kv_heads, head_dim]`` each.

    Attributes:
        num_layers: Layers of the full model.
        num_kv_heads: KV heads per layer.
        head_dim: Elements per head.
        dtype: Element type in lower case, such as "bfloat16".
        rope_type: "default", "linear", "llama3" or "yarn".
        rope_theta: Base of the series of frequencies.
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: str
    rope_type: str
    rope_theta: float

    @classmethod
    def from_proto(cls, message: common_pb2.KvSpec) -> KvShape:
        changed = {
            "dtype": _name(common_pb2.DType, message.dtype, "DTYPE_"),
            "rope_type": message.rope.type,
            "rope_theta": message.rope.theta,
        }
        return cls(**shared_fields(cls, message) | changed)


@dataclass(frozen=True, slots=True)
class ProcessStatus:
    """Status that one process reports about itself.

    Attributes:
        id: Name of the process.
        stage: Its role; of a worker with both stages "decode".
        pid: Process id on its own host.
        address: host:port at which other processes reach it.
        ready: Whether it accepts requests; a router is ready when each stage has a ready worker.
        draining: Whether it refuses new requests, and exits once the running ones have ended.
        load: Load of a worker; None for routers.
        software_version: Version of OverFill.
        incarnation: Random number, drawn when the process started.
        model: Pair of a worker; None for routers.
        kv: Shape of the full model's KV; None for routers.
        codec: Codec of the KV transfers to a decode worker; None for other processes.
        metrics_address: host:port of ``/metrics``; None means that the process serves no metrics.
        engine: A worker's engine with its version, for people; None means unknown, and a router.
        tier: Tier of a decode worker; None means the only one, and other processes.
        startup_seconds: Seconds that a worker took to start, without the preparation of a pair; 0 for routers.
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
    engine: str | None = None
    tier: str | None = None
    startup_seconds: float = 0.0

    @classmethod
    def from_proto(cls, message: admin_pb2.ProcessStatus) -> ProcessStatus:
        changed = {
            "stage": _stage(message.stage),
            "load": WorkerLoad.from_proto(message.load) if message.HasField("load") else None,
            "model": ModelIdentity.from_proto(message.model) if message.HasField("model") else None,
            "kv": KvShape.from_proto(message.kv) if message.HasField("kv") else None,
            "codec": CODEC_NAMES.get(message.codec),
            "metrics_address": message.metrics_address or None,
            "engine": message.engine or None,
            "tier": message.tier or None,
        }
        return cls(**shared_fields(cls, message) | changed)


@dataclass(frozen=True, slots=True)
class AdapterChange:
    """What one decode worker has done when an adapter was to be loaded or unloaded.

    Attributes:
        worker_id: Name of the worker.
        digest: Digest of the adapter; None if it is unknown.
        error: Why the worker has not done it; None if it has, or had done so before.
    """

    worker_id: str
    digest: str | None
    error: str | None

    @classmethod
    def from_proto(cls, message: admin_pb2.AdapterChange) -> AdapterChange:
        return cls(message.worker_id, message.adapter.digest or None, message.error or None)


@dataclass(frozen=True, slots=True)
class WorkerStatus:
    """A worker, in one of its stages, as the router knows it.

    Attributes:
        id: Name of the worker.
        stage: The stage that this entry is about, with the load in ``process``.
        address: host:port of the worker.
        process: What the worker reports; None if it did not answer.
        tier: Tier of a worker that decodes; None in the entry of the prefill stage.
        colocated: Whether the worker has both stages: another entry with the same id is about the other stage.
        adapters: Digests of the adapters of a worker that decodes, by name.
        revision: Revision of its pair; empty in a stack without revisions.
    """

    id: str
    stage: Stage
    address: str
    process: ProcessStatus | None
    tier: str | None = None
    colocated: bool = False
    adapters: Mapping[str, str] = field(default_factory=dict)
    revision: str = ""

    @property
    def state(self) -> ProcessState:
        """The worker's state; "silent" means that it did not answer."""
        return _state(self.process)

    @classmethod
    def from_proto(cls, message: admin_pb2.WorkerStatus) -> WorkerStatus:
        process = ProcessStatus.from_proto(message.process) if message.HasField("process") else None
        stage, tier = _stage(message.stage), message.tier or None
        adapters = {adapter.name: adapter.digest for adapter in message.adapters}
        return cls(message.id, stage, message.address, process, tier, message.colocated, adapters, message.revision)


@dataclass(frozen=True, slots=True)
class Percentiles:
    """Percentiles of a duration over the last minute, in seconds.

    Attributes:
        p50: Median.
        p90: 90th percentile.
        p99: 99th percentile.
    """

    p50: float
    p90: float
    p99: float


@dataclass(frozen=True, slots=True)
class SessionActivity:
    """What one session has done while it was active: with a request in each five minutes.

    Attributes:
        id: Digest of its name.
        turns: Number of complete answers.
        prompt_tokens: Prompt tokens of these answers.
        cached_tokens: Those of them that the full model did not compute for these turns.
    """

    id: str
    turns: int
    prompt_tokens: int
    cached_tokens: int

    @property
    def cached_share(self) -> float | None:
        """Share of the prompt tokens that were cached; None before the first answer."""
        return self.cached_tokens / self.prompt_tokens if self.prompt_tokens else None

    @classmethod
    def from_proto(cls, message: admin_pb2.SessionActivity) -> SessionActivity:
        return cls(**shared_fields(cls, message))


@dataclass(frozen=True, slots=True)
class Activity:
    """Current and recent activity of one router or several.

    Attributes:
        running: Number of requests on a decode worker.
        waiting: Number of requests that wait for a worker of either stage.
        tokens_per_second: Tokens sent to clients per second, mean of the last 10 seconds.
        answers: Number of answers completed in the last minute.
        timing: Percentiles of these answers by name: the fields of ``Timing``, ``unattributed``, and ``itl``, which is
            the mean time between an answer's tokens.
        sessions: Number of clients' sessions with a request in the last five minutes.
        prompt_tokens: Prompt tokens of these answers.
        cached_tokens: Those of them that the full model did not compute for these answers.
        peer_tokens: Part of ``cached_tokens`` that prefill workers took from other workers.
        disk_tokens: Part of ``cached_tokens`` that prefill workers read from disk.
        busiest_sessions: Up to five of the sessions, the most turns first.
    """

    running: int
    waiting: int
    tokens_per_second: float
    answers: int
    timing: dict[str, Percentiles]
    sessions: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    busiest_sessions: tuple[SessionActivity, ...] = ()
    peer_tokens: int = 0
    disk_tokens: int = 0

    @property
    def cached_share(self) -> float | None:
        """Share of the last minute's prompt tokens that were cached; None without an answer."""
        return self.cached_tokens / self.prompt_tokens if self.prompt_tokens else None

    @property
    def cached_shares(self) -> dict[str, float] | None:
        """Parts of ``cached_share``: by KV in memory, at a peer, and on disk. None without an answer."""
        total = self.prompt_tokens
        return {name: tokens / total for name, tokens in cached_by_source(self).items()} if total else None

    @classmethod
    def from_proto(cls, message: admin_pb2.Activity) -> Activity:
        changed = {
            "timing": {t.name: Percentiles(t.p50_seconds, t.p90_seconds, t.p99_seconds) for t in message.timing},
            "busiest_sessions": tuple(SessionActivity.from_proto(one) for one in message.busiest_sessions),
        }
        return cls(**shared_fields(cls, message) | changed)


@dataclass(frozen=True, slots=True)
class RouterStatus:
    """One of the router processes that share an address.

    Attributes:
        id: Name of the process.
        address: host:port of its own, at which workers join it.
        process: What it reports; None if it did not answer.
        activity: What it serves; None if it did not answer.
    """

    id: str
    address: str
    process: ProcessStatus | None
    activity: Activity | None

    @property
    def state(self) -> ProcessState:
        """The router's state: "starting" without a ready worker of each stage, "silent" if it did not answer."""
        return _state(self.process)

    @classmethod
    def from_proto(cls, message: admin_pb2.RouterStatus) -> RouterStatus:
        process = ProcessStatus.from_proto(message.process) if message.HasField("process") else None
        activity = Activity.from_proto(message.activity) if message.HasField("activity") else None
        return cls(message.id, message.address, process, activity)


@dataclass(frozen=True, slots=True)
class PoolStatus:
    """Number of ready workers of one stage or tier, and the number with which the stack is complete.

    In the status of a stack, both revisions count.

    Attributes:
        ready: Number of workers that are ready and not draining.
        expected: Number of workers with which the stack was started.
        tier: Tier of the pool; None for a whole stage.
        brownout: Whether the tier is overloaded, so that requests that allow it go to the next tier.
    """

    ready: int
    expected: int
    tier: str | None = None
    brownout: bool = False


@dataclass(frozen=True, slots=True)
class StackStatus:
    """Status of the routers at an address and their workers, or of a single worker.

    A single worker reports only ``process``.

    Attributes:
        process: The process that answered.
        workers: The router's workers, ordered by revision, stage and id; a worker with both stages once for each.
        complete: Whether as many workers of each stage are ready as the stack was started with.
        http_address: host:port of the router's HTTP endpoint; None means that it serves none.
        activity: Activity of all router processes at the address; None for a worker.
        pools: Worker counts by stage.
        tiers: Worker counts of the decode stage by tier.
        routers: The router processes that share the address, first the one that answered.
    """

    process: ProcessStatus
    workers: tuple[WorkerStatus, ...]
    complete: bool
    http_address: str | None
    activity: Activity | None = None
    pools: dict[Stage, PoolStatus] = field(default_factory=dict)
    routers: tuple[RouterStatus, ...] = ()
    tiers: dict[str, PoolStatus] = field(default_factory=dict)

    @property
    def with_revisions(self) -> bool:
        """Whether a worker's pair has a revision."""
        return any(worker.revision for worker in self.workers)

    @property
    def several_tiers(self) -> bool:
        """Whether requests can choose among tiers."""
        return len(self.tiers) > 1

    @property
    def serving(self) -> bool:
        """Whether the stack can answer requests now: the process and a worker of each stage are ready."""
        return self.process.ready and all(pool.ready for pool in self.pools.values())

    @classmethod
    def from_proto(cls, message: admin_pb2.StatusResponse) -> StackStatus:
        pools, tiers = _pools(message.pools)
        return cls(
            process=ProcessStatus.from_proto(message.process),
            workers=tuple(WorkerStatus.from_proto(worker) for worker in message.workers),
            complete=message.complete,
            http_address=message.http_address or None,
            activity=Activity.from_proto(message.activity) if message.HasField("activity") else None,
            pools=pools,
            routers=tuple(RouterStatus.from_proto(router) for router in message.routers),
            tiers=tiers,
        )

    def reached_at(self, address: str) -> StackStatus:
        """This status with addresses that a client can use, where the process listens on a wildcard such as 0.0.0.0.

        Args:
            address: Address at which the client has reached the process.
        """
        process, host = self.process, target_host(address)
        wildcard = process.address != (process.address and instead_of_wildcard(process.address, host))
        return replace(
            self,
            process=replace(
                process,
                address=address if wildcard else process.address,
                metrics_address=process.metrics_address and instead_of_wildcard(process.metrics_address, host),
            ),
            http_address=self.http_address and instead_of_wildcard(self.http_address, host),
        )


@dataclass(frozen=True, slots=True)
class RevisionStatus:
    """One of the revisions that a stack serves.

    Attributes:
        name: Its name; empty for a revision without a name.
        percent: Share of new conversations that is set now, 0 to 100.
        ready: Whether both of its stages have a ready worker. The new revision gets no request before.
        running: Number of requests that it answers now, without those that wait in other routers than the one asked.
        pools: Worker counts by stage.
        tiers: Worker counts of the decode stage by tier.
    """

    name: str
    percent: float
    ready: bool
    running: int
    pools: dict[Stage, PoolStatus] = field(default_factory=dict)
    tiers: dict[str, PoolStatus] = field(default_factory=dict)

    @classmethod
    def from_proto(cls, message: admin_pb2.RevisionStatus) -> RevisionStatus:
        pools, tiers = _pools(message.pools)
        return cls(**shared_fields(cls, message) | {"pools": pools, "tiers": tiers})


@dataclass(frozen=True, slots=True)
class RolloutStatus:
    """How a stack divides new conversations between its revisions.

    Attributes:
        revisions: The old one first; only one while there is no rollout.
        target_percent: Share of the new revision at the end of the current change, 0 to 100.
        remaining_seconds: Seconds until then; 0 if the change has ended or is paused.
        paused: Whether the change was stopped before its end.
    """

    revisions: tuple[RevisionStatus, ...]
    target_percent: float
    remaining_seconds: float
    paused: bool

    @classmethod
    def from_proto(cls, message: admin_pb2.RolloutStatus) -> RolloutStatus:
        revisions = tuple(RevisionStatus.from_proto(one) for one in message.revisions)
        return cls(**shared_fields(cls, message) | {"revisions": revisions})


def _pools(messages: Iterable[admin_pb2.PoolStatus]) -> tuple[dict[Stage, PoolStatus], dict[str, PoolStatus]]:
    """Returns the worker counts by stage, and those of the decode stage by tier, over all revisions."""
    pools: dict[Stage, PoolStatus] = {}
    tiers: dict[str, PoolStatus] = {}
    for pool in messages:
        stage = _stage(pool.stage)
        others = pools.get(stage, PoolStatus(0, 0))
        pools[stage] = PoolStatus(others.ready + pool.ready, others.expected + pool.expected)
        if pool.tier:
            others = tiers.get(pool.tier, PoolStatus(0, 0))
            ready, expected = others.ready + pool.ready, others.expected + pool.expected
            tiers[pool.tier] = PoolStatus(ready, expected, pool.tier, others.brownout or pool.brownout)
    return pools, tiers


def _state(process: ProcessStatus | None) -> ProcessState:
    if process is None:
        return "silent"
    if process.draining:
        return "draining"
    return "ready" if process.ready else "starting"


def _stage(value: int) -> Stage:
    return _name(common_pb2.Stage, value, "STAGE_")  # type: ignore[return-value]


def _name(enum: Any, value: int, prefix: str) -> str:
    """Lower-case name of an enum value without ``prefix``; "unspecified" for a newer peer's unknown value."""
    name: str = enum.Name(value if value in enum.values() else 0)
    return name.removeprefix(prefix).lower()

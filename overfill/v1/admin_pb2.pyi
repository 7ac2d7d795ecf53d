from overfill.v1 import common_pb2 as _common_pb2
from overfill.v1 import decode_pb2 as _decode_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ChangeRolloutRequest(_message.Message):
    __slots__ = ("set", "pause", "undo")
    SET_FIELD_NUMBER: _ClassVar[int]
    PAUSE_FIELD_NUMBER: _ClassVar[int]
    UNDO_FIELD_NUMBER: _ClassVar[int]
    set: SetShare
    pause: bool
    undo: bool
    def __init__(self, set: _Optional[_Union[SetShare, _Mapping]] = ..., pause: bool = ..., undo: bool = ...) -> None: ...

class SetShare(_message.Message):
    __slots__ = ("revision", "percent", "over_seconds")
    REVISION_FIELD_NUMBER: _ClassVar[int]
    PERCENT_FIELD_NUMBER: _ClassVar[int]
    OVER_SECONDS_FIELD_NUMBER: _ClassVar[int]
    revision: str
    percent: float
    over_seconds: float
    def __init__(self, revision: _Optional[str] = ..., percent: _Optional[float] = ..., over_seconds: _Optional[float] = ...) -> None: ...

class RolloutStatus(_message.Message):
    __slots__ = ("revisions", "target_percent", "remaining_seconds", "paused")
    REVISIONS_FIELD_NUMBER: _ClassVar[int]
    TARGET_PERCENT_FIELD_NUMBER: _ClassVar[int]
    REMAINING_SECONDS_FIELD_NUMBER: _ClassVar[int]
    PAUSED_FIELD_NUMBER: _ClassVar[int]
    revisions: _containers.RepeatedCompositeFieldContainer[RevisionStatus]
    target_percent: float
    remaining_seconds: float
    paused: bool
    def __init__(self, revisions: _Optional[_Iterable[_Union[RevisionStatus, _Mapping]]] = ..., target_percent: _Optional[float] = ..., remaining_seconds: _Optional[float] = ..., paused: bool = ...) -> None: ...

class RevisionStatus(_message.Message):
    __slots__ = ("name", "percent", "ready", "pools", "running")
    NAME_FIELD_NUMBER: _ClassVar[int]
    PERCENT_FIELD_NUMBER: _ClassVar[int]
    READY_FIELD_NUMBER: _ClassVar[int]
    POOLS_FIELD_NUMBER: _ClassVar[int]
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    name: str
    percent: float
    ready: bool
    pools: _containers.RepeatedCompositeFieldContainer[PoolStatus]
    running: int
    def __init__(self, name: _Optional[str] = ..., percent: _Optional[float] = ..., ready: bool = ..., pools: _Optional[_Iterable[_Union[PoolStatus, _Mapping]]] = ..., running: _Optional[int] = ...) -> None: ...

class LoadAdapterRequest(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class UnloadAdapterRequest(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class ChangeAdapterResponse(_message.Message):
    __slots__ = ("workers",)
    WORKERS_FIELD_NUMBER: _ClassVar[int]
    workers: _containers.RepeatedCompositeFieldContainer[AdapterChange]
    def __init__(self, workers: _Optional[_Iterable[_Union[AdapterChange, _Mapping]]] = ...) -> None: ...

class AdapterChange(_message.Message):
    __slots__ = ("worker_id", "adapter", "error")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    adapter: _common_pb2.Adapter
    error: str
    def __init__(self, worker_id: _Optional[str] = ..., adapter: _Optional[_Union[_common_pb2.Adapter, _Mapping]] = ..., error: _Optional[str] = ...) -> None: ...

class StatusRequest(_message.Message):
    __slots__ = ("alone",)
    ALONE_FIELD_NUMBER: _ClassVar[int]
    alone: bool
    def __init__(self, alone: bool = ...) -> None: ...

class StatusResponse(_message.Message):
    __slots__ = ("process", "workers", "complete", "http_address", "activity", "pools", "routers")
    PROCESS_FIELD_NUMBER: _ClassVar[int]
    WORKERS_FIELD_NUMBER: _ClassVar[int]
    COMPLETE_FIELD_NUMBER: _ClassVar[int]
    HTTP_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    ACTIVITY_FIELD_NUMBER: _ClassVar[int]
    POOLS_FIELD_NUMBER: _ClassVar[int]
    ROUTERS_FIELD_NUMBER: _ClassVar[int]
    process: ProcessStatus
    workers: _containers.RepeatedCompositeFieldContainer[WorkerStatus]
    complete: bool
    http_address: str
    activity: Activity
    pools: _containers.RepeatedCompositeFieldContainer[PoolStatus]
    routers: _containers.RepeatedCompositeFieldContainer[RouterStatus]
    def __init__(self, process: _Optional[_Union[ProcessStatus, _Mapping]] = ..., workers: _Optional[_Iterable[_Union[WorkerStatus, _Mapping]]] = ..., complete: bool = ..., http_address: _Optional[str] = ..., activity: _Optional[_Union[Activity, _Mapping]] = ..., pools: _Optional[_Iterable[_Union[PoolStatus, _Mapping]]] = ..., routers: _Optional[_Iterable[_Union[RouterStatus, _Mapping]]] = ...) -> None: ...

class RouterStatus(_message.Message):
    __slots__ = ("id", "address", "process", "activity")
    ID_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    PROCESS_FIELD_NUMBER: _ClassVar[int]
    ACTIVITY_FIELD_NUMBER: _ClassVar[int]
    id: str
    address: str
    process: ProcessStatus
    activity: Activity
    def __init__(self, id: _Optional[str] = ..., address: _Optional[str] = ..., process: _Optional[_Union[ProcessStatus, _Mapping]] = ..., activity: _Optional[_Union[Activity, _Mapping]] = ...) -> None: ...

class PoolStatus(_message.Message):
    __slots__ = ("stage", "ready", "expected", "tier", "brownout", "revision")
    STAGE_FIELD_NUMBER: _ClassVar[int]
    READY_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_FIELD_NUMBER: _ClassVar[int]
    TIER_FIELD_NUMBER: _ClassVar[int]
    BROWNOUT_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    stage: _common_pb2.Stage
    ready: int
    expected: int
    tier: str
    brownout: bool
    revision: str
    def __init__(self, stage: _Optional[_Union[_common_pb2.Stage, str]] = ..., ready: _Optional[int] = ..., expected: _Optional[int] = ..., tier: _Optional[str] = ..., brownout: bool = ..., revision: _Optional[str] = ...) -> None: ...

class Activity(_message.Message):
    __slots__ = ("running", "waiting", "tokens_per_second", "answers", "timing", "histograms", "sessions", "prompt_tokens", "cached_tokens", "busiest_sessions", "peer_tokens", "disk_tokens")
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    WAITING_FIELD_NUMBER: _ClassVar[int]
    TOKENS_PER_SECOND_FIELD_NUMBER: _ClassVar[int]
    ANSWERS_FIELD_NUMBER: _ClassVar[int]
    TIMING_FIELD_NUMBER: _ClassVar[int]
    HISTOGRAMS_FIELD_NUMBER: _ClassVar[int]
    SESSIONS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    BUSIEST_SESSIONS_FIELD_NUMBER: _ClassVar[int]
    PEER_TOKENS_FIELD_NUMBER: _ClassVar[int]
    DISK_TOKENS_FIELD_NUMBER: _ClassVar[int]
    running: int
    waiting: int
    tokens_per_second: float
    answers: int
    timing: _containers.RepeatedCompositeFieldContainer[Percentiles]
    histograms: _containers.RepeatedCompositeFieldContainer[Histogram]
    sessions: int
    prompt_tokens: int
    cached_tokens: int
    busiest_sessions: _containers.RepeatedCompositeFieldContainer[SessionActivity]
    peer_tokens: int
    disk_tokens: int
    def __init__(self, running: _Optional[int] = ..., waiting: _Optional[int] = ..., tokens_per_second: _Optional[float] = ..., answers: _Optional[int] = ..., timing: _Optional[_Iterable[_Union[Percentiles, _Mapping]]] = ..., histograms: _Optional[_Iterable[_Union[Histogram, _Mapping]]] = ..., sessions: _Optional[int] = ..., prompt_tokens: _Optional[int] = ..., cached_tokens: _Optional[int] = ..., busiest_sessions: _Optional[_Iterable[_Union[SessionActivity, _Mapping]]] = ..., peer_tokens: _Optional[int] = ..., disk_tokens: _Optional[int] = ...) -> None: ...

class SessionActivity(_message.Message):
    __slots__ = ("id", "turns", "prompt_tokens", "cached_tokens")
    ID_FIELD_NUMBER: _ClassVar[int]
    TURNS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    id: str
    turns: int
    prompt_tokens: int
    cached_tokens: int
    def __init__(self, id: _Optional[str] = ..., turns: _Optional[int] = ..., prompt_tokens: _Optional[int] = ..., cached_tokens: _Optional[int] = ...) -> None: ...

class Histogram(_message.Message):
    __slots__ = ("name", "bucket", "count")
    NAME_FIELD_NUMBER: _ClassVar[int]
    BUCKET_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    name: str
    bucket: _containers.RepeatedScalarFieldContainer[int]
    count: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, name: _Optional[str] = ..., bucket: _Optional[_Iterable[int]] = ..., count: _Optional[_Iterable[int]] = ...) -> None: ...

class Percentiles(_message.Message):
    __slots__ = ("name", "p50_seconds", "p90_seconds", "p99_seconds")
    NAME_FIELD_NUMBER: _ClassVar[int]
    P50_SECONDS_FIELD_NUMBER: _ClassVar[int]
    P90_SECONDS_FIELD_NUMBER: _ClassVar[int]
    P99_SECONDS_FIELD_NUMBER: _ClassVar[int]
    name: str
    p50_seconds: float
    p90_seconds: float
    p99_seconds: float
    def __init__(self, name: _Optional[str] = ..., p50_seconds: _Optional[float] = ..., p90_seconds: _Optional[float] = ..., p99_seconds: _Optional[float] = ...) -> None: ...

class ProcessStatus(_message.Message):
    __slots__ = ("id", "stage", "pid", "address", "ready", "draining", "load", "software_version", "incarnation", "model", "kv", "codec", "metrics_address", "engine", "tier", "prefill_load", "startup_seconds")
    ID_FIELD_NUMBER: _ClassVar[int]
    STAGE_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    READY_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    SOFTWARE_VERSION_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    KV_FIELD_NUMBER: _ClassVar[int]
    CODEC_FIELD_NUMBER: _ClassVar[int]
    METRICS_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    ENGINE_FIELD_NUMBER: _ClassVar[int]
    TIER_FIELD_NUMBER: _ClassVar[int]
    PREFILL_LOAD_FIELD_NUMBER: _ClassVar[int]
    STARTUP_SECONDS_FIELD_NUMBER: _ClassVar[int]
    id: str
    stage: _common_pb2.Stage
    pid: int
    address: str
    ready: bool
    draining: bool
    load: _decode_pb2.WorkerLoad
    software_version: str
    incarnation: int
    model: _common_pb2.ModelIdentity
    kv: _common_pb2.KvSpec
    codec: _common_pb2.KvCodec
    metrics_address: str
    engine: str
    tier: str
    prefill_load: _decode_pb2.WorkerLoad
    startup_seconds: float
    def __init__(self, id: _Optional[str] = ..., stage: _Optional[_Union[_common_pb2.Stage, str]] = ..., pid: _Optional[int] = ..., address: _Optional[str] = ..., ready: bool = ..., draining: bool = ..., load: _Optional[_Union[_decode_pb2.WorkerLoad, _Mapping]] = ..., software_version: _Optional[str] = ..., incarnation: _Optional[int] = ..., model: _Optional[_Union[_common_pb2.ModelIdentity, _Mapping]] = ..., kv: _Optional[_Union[_common_pb2.KvSpec, _Mapping]] = ..., codec: _Optional[_Union[_common_pb2.KvCodec, str]] = ..., metrics_address: _Optional[str] = ..., engine: _Optional[str] = ..., tier: _Optional[str] = ..., prefill_load: _Optional[_Union[_decode_pb2.WorkerLoad, _Mapping]] = ..., startup_seconds: _Optional[float] = ...) -> None: ...

class WorkerStatus(_message.Message):
    __slots__ = ("id", "stage", "address", "process", "tier", "colocated", "adapters", "revision")
    ID_FIELD_NUMBER: _ClassVar[int]
    STAGE_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    PROCESS_FIELD_NUMBER: _ClassVar[int]
    TIER_FIELD_NUMBER: _ClassVar[int]
    COLOCATED_FIELD_NUMBER: _ClassVar[int]
    ADAPTERS_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    id: str
    stage: _common_pb2.Stage
    address: str
    process: ProcessStatus
    tier: str
    colocated: bool
    adapters: _containers.RepeatedCompositeFieldContainer[_common_pb2.Adapter]
    revision: str
    def __init__(self, id: _Optional[str] = ..., stage: _Optional[_Union[_common_pb2.Stage, str]] = ..., address: _Optional[str] = ..., process: _Optional[_Union[ProcessStatus, _Mapping]] = ..., tier: _Optional[str] = ..., colocated: bool = ..., adapters: _Optional[_Iterable[_Union[_common_pb2.Adapter, _Mapping]]] = ..., revision: _Optional[str] = ...) -> None: ...

class DrainRequest(_message.Message):
    __slots__ = ("worker_id",)
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    def __init__(self, worker_id: _Optional[str] = ...) -> None: ...

class DrainResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

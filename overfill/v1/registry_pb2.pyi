from overfill.v1 import common_pb2 as _common_pb2
from overfill.v1 import decode_pb2 as _decode_pb2
from overfill.v1 import kv_pb2 as _kv_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class JoinRequest(_message.Message):
    __slots__ = ("hello", "report")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    REPORT_FIELD_NUMBER: _ClassVar[int]
    hello: Hello
    report: Report
    def __init__(self, hello: _Optional[_Union[Hello, _Mapping]] = ..., report: _Optional[_Union[Report, _Mapping]] = ...) -> None: ...

class Hello(_message.Message):
    __slots__ = ("worker_id", "incarnation", "stages", "address", "wire_version", "software_version", "model", "kv", "max_model_len", "vocab_size", "pid", "metrics_address", "startup_seconds", "data_addresses", "tier", "engine", "max_num_seqs", "adapters", "lends_kv")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    STAGES_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    WIRE_VERSION_FIELD_NUMBER: _ClassVar[int]
    SOFTWARE_VERSION_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    KV_FIELD_NUMBER: _ClassVar[int]
    MAX_MODEL_LEN_FIELD_NUMBER: _ClassVar[int]
    VOCAB_SIZE_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    METRICS_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    STARTUP_SECONDS_FIELD_NUMBER: _ClassVar[int]
    DATA_ADDRESSES_FIELD_NUMBER: _ClassVar[int]
    TIER_FIELD_NUMBER: _ClassVar[int]
    ENGINE_FIELD_NUMBER: _ClassVar[int]
    MAX_NUM_SEQS_FIELD_NUMBER: _ClassVar[int]
    ADAPTERS_FIELD_NUMBER: _ClassVar[int]
    LENDS_KV_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    incarnation: int
    stages: _containers.RepeatedScalarFieldContainer[_common_pb2.Stage]
    address: str
    wire_version: int
    software_version: str
    model: _common_pb2.ModelIdentity
    kv: _common_pb2.KvSpec
    max_model_len: int
    vocab_size: int
    pid: int
    metrics_address: str
    startup_seconds: float
    data_addresses: _containers.RepeatedCompositeFieldContainer[_kv_pb2.DataAddress]
    tier: str
    engine: str
    max_num_seqs: int
    adapters: _containers.RepeatedCompositeFieldContainer[_common_pb2.Adapter]
    lends_kv: bool
    def __init__(self, worker_id: _Optional[str] = ..., incarnation: _Optional[int] = ..., stages: _Optional[_Iterable[_Union[_common_pb2.Stage, str]]] = ..., address: _Optional[str] = ..., wire_version: _Optional[int] = ..., software_version: _Optional[str] = ..., model: _Optional[_Union[_common_pb2.ModelIdentity, _Mapping]] = ..., kv: _Optional[_Union[_common_pb2.KvSpec, _Mapping]] = ..., max_model_len: _Optional[int] = ..., vocab_size: _Optional[int] = ..., pid: _Optional[int] = ..., metrics_address: _Optional[str] = ..., startup_seconds: _Optional[float] = ..., data_addresses: _Optional[_Iterable[_Union[_kv_pb2.DataAddress, _Mapping]]] = ..., tier: _Optional[str] = ..., engine: _Optional[str] = ..., max_num_seqs: _Optional[int] = ..., adapters: _Optional[_Iterable[_Union[_common_pb2.Adapter, _Mapping]]] = ..., lends_kv: bool = ...) -> None: ...

class Report(_message.Message):
    __slots__ = ("load", "credits", "ready", "draining", "prefix", "routers", "prefill_load", "adapters", "disk", "costs", "rollout")
    LOAD_FIELD_NUMBER: _ClassVar[int]
    CREDITS_FIELD_NUMBER: _ClassVar[int]
    READY_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    PREFIX_FIELD_NUMBER: _ClassVar[int]
    ROUTERS_FIELD_NUMBER: _ClassVar[int]
    PREFILL_LOAD_FIELD_NUMBER: _ClassVar[int]
    ADAPTERS_FIELD_NUMBER: _ClassVar[int]
    DISK_FIELD_NUMBER: _ClassVar[int]
    COSTS_FIELD_NUMBER: _ClassVar[int]
    ROLLOUT_FIELD_NUMBER: _ClassVar[int]
    load: _decode_pb2.WorkerLoad
    credits: int
    ready: bool
    draining: bool
    prefix: PrefixDelta
    routers: int
    prefill_load: _decode_pb2.WorkerLoad
    adapters: AdapterList
    disk: PrefixDelta
    costs: KvCosts
    rollout: Rollout
    def __init__(self, load: _Optional[_Union[_decode_pb2.WorkerLoad, _Mapping]] = ..., credits: _Optional[int] = ..., ready: bool = ..., draining: bool = ..., prefix: _Optional[_Union[PrefixDelta, _Mapping]] = ..., routers: _Optional[int] = ..., prefill_load: _Optional[_Union[_decode_pb2.WorkerLoad, _Mapping]] = ..., adapters: _Optional[_Union[AdapterList, _Mapping]] = ..., disk: _Optional[_Union[PrefixDelta, _Mapping]] = ..., costs: _Optional[_Union[KvCosts, _Mapping]] = ..., rollout: _Optional[_Union[Rollout, _Mapping]] = ...) -> None: ...

class Rollout(_message.Message):
    __slots__ = ("generation", "tie_break", "revision", "from_percent", "to_percent", "started_ms", "duration_ms", "paused")
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    TIE_BREAK_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    FROM_PERCENT_FIELD_NUMBER: _ClassVar[int]
    TO_PERCENT_FIELD_NUMBER: _ClassVar[int]
    STARTED_MS_FIELD_NUMBER: _ClassVar[int]
    DURATION_MS_FIELD_NUMBER: _ClassVar[int]
    PAUSED_FIELD_NUMBER: _ClassVar[int]
    generation: int
    tie_break: int
    revision: str
    from_percent: float
    to_percent: float
    started_ms: int
    duration_ms: int
    paused: bool
    def __init__(self, generation: _Optional[int] = ..., tie_break: _Optional[int] = ..., revision: _Optional[str] = ..., from_percent: _Optional[float] = ..., to_percent: _Optional[float] = ..., started_ms: _Optional[int] = ..., duration_ms: _Optional[int] = ..., paused: bool = ...) -> None: ...

class KvCosts(_message.Message):
    __slots__ = ("compute_ns", "peer_ns", "disk_ns")
    COMPUTE_NS_FIELD_NUMBER: _ClassVar[int]
    PEER_NS_FIELD_NUMBER: _ClassVar[int]
    DISK_NS_FIELD_NUMBER: _ClassVar[int]
    compute_ns: int
    peer_ns: int
    disk_ns: int
    def __init__(self, compute_ns: _Optional[int] = ..., peer_ns: _Optional[int] = ..., disk_ns: _Optional[int] = ...) -> None: ...

class AdapterList(_message.Message):
    __slots__ = ("adapters",)
    ADAPTERS_FIELD_NUMBER: _ClassVar[int]
    adapters: _containers.RepeatedCompositeFieldContainer[_common_pb2.Adapter]
    def __init__(self, adapters: _Optional[_Iterable[_Union[_common_pb2.Adapter, _Mapping]]] = ...) -> None: ...

class PrefixDelta(_message.Message):
    __slots__ = ("added", "removed", "replaces")
    ADDED_FIELD_NUMBER: _ClassVar[int]
    REMOVED_FIELD_NUMBER: _ClassVar[int]
    REPLACES_FIELD_NUMBER: _ClassVar[int]
    added: _containers.RepeatedScalarFieldContainer[int]
    removed: _containers.RepeatedScalarFieldContainer[int]
    replaces: bool
    def __init__(self, added: _Optional[_Iterable[int]] = ..., removed: _Optional[_Iterable[int]] = ..., replaces: bool = ...) -> None: ...

class JoinResponse(_message.Message):
    __slots__ = ("welcome", "demand", "rollout")
    WELCOME_FIELD_NUMBER: _ClassVar[int]
    DEMAND_FIELD_NUMBER: _ClassVar[int]
    ROLLOUT_FIELD_NUMBER: _ClassVar[int]
    welcome: Welcome
    demand: Demand
    rollout: Rollout
    def __init__(self, welcome: _Optional[_Union[Welcome, _Mapping]] = ..., demand: _Optional[_Union[Demand, _Mapping]] = ..., rollout: _Optional[_Union[Rollout, _Mapping]] = ...) -> None: ...

class Welcome(_message.Message):
    __slots__ = ("router_id",)
    ROUTER_ID_FIELD_NUMBER: _ClassVar[int]
    router_id: str
    def __init__(self, router_id: _Optional[str] = ...) -> None: ...

class Demand(_message.Message):
    __slots__ = ("in_use", "queued")
    IN_USE_FIELD_NUMBER: _ClassVar[int]
    QUEUED_FIELD_NUMBER: _ClassVar[int]
    in_use: int
    queued: int
    def __init__(self, in_use: _Optional[int] = ..., queued: _Optional[int] = ...) -> None: ...

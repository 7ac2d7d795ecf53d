from overfill.v1 import common_pb2 as _common_pb2
from overfill.v1 import kv_pb2 as _kv_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class DescribeDecodeRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class DescribeDecodeResponse(_message.Message):
    __slots__ = ("wire_version", "software_version", "worker_id", "incarnation", "model", "kv", "layer_map", "max_model_len", "engine")
    WIRE_VERSION_FIELD_NUMBER: _ClassVar[int]
    SOFTWARE_VERSION_FIELD_NUMBER: _ClassVar[int]
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    KV_FIELD_NUMBER: _ClassVar[int]
    LAYER_MAP_FIELD_NUMBER: _ClassVar[int]
    MAX_MODEL_LEN_FIELD_NUMBER: _ClassVar[int]
    ENGINE_FIELD_NUMBER: _ClassVar[int]
    wire_version: int
    software_version: str
    worker_id: str
    incarnation: int
    model: _common_pb2.ModelIdentity
    kv: _common_pb2.KvSpec
    layer_map: _containers.RepeatedScalarFieldContainer[int]
    max_model_len: int
    engine: str
    def __init__(self, wire_version: _Optional[int] = ..., software_version: _Optional[str] = ..., worker_id: _Optional[str] = ..., incarnation: _Optional[int] = ..., model: _Optional[_Union[_common_pb2.ModelIdentity, _Mapping]] = ..., kv: _Optional[_Union[_common_pb2.KvSpec, _Mapping]] = ..., layer_map: _Optional[_Iterable[int]] = ..., max_model_len: _Optional[int] = ..., engine: _Optional[str] = ...) -> None: ...

class RouterMessage(_message.Message):
    __slots__ = ("commands",)
    COMMANDS_FIELD_NUMBER: _ClassVar[int]
    commands: _containers.RepeatedCompositeFieldContainer[SequenceCommand]
    def __init__(self, commands: _Optional[_Iterable[_Union[SequenceCommand, _Mapping]]] = ...) -> None: ...

class SequenceCommand(_message.Message):
    __slots__ = ("sequence", "start", "assign_prefill", "evict", "cancel")
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    ASSIGN_PREFILL_FIELD_NUMBER: _ClassVar[int]
    EVICT_FIELD_NUMBER: _ClassVar[int]
    CANCEL_FIELD_NUMBER: _ClassVar[int]
    sequence: int
    start: StartDecode
    assign_prefill: AssignPrefill
    evict: Evict
    cancel: CancelDecode
    def __init__(self, sequence: _Optional[int] = ..., start: _Optional[_Union[StartDecode, _Mapping]] = ..., assign_prefill: _Optional[_Union[AssignPrefill, _Mapping]] = ..., evict: _Optional[_Union[Evict, _Mapping]] = ..., cancel: _Optional[_Union[CancelDecode, _Mapping]] = ...) -> None: ...

class StartDecode(_message.Message):
    __slots__ = ("request_id", "attempt", "expected_incarnation", "prompt_token_ids", "emitted_token_ids", "sampling", "eos_token_ids", "cache_namespace", "trace", "sample_index", "codec", "time_left_ns", "traceparent", "assign_prefill", "answer_start", "adapter_digest")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_INCARNATION_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    EMITTED_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    EOS_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    CACHE_NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    TRACE_FIELD_NUMBER: _ClassVar[int]
    SAMPLE_INDEX_FIELD_NUMBER: _ClassVar[int]
    CODEC_FIELD_NUMBER: _ClassVar[int]
    TIME_LEFT_NS_FIELD_NUMBER: _ClassVar[int]
    TRACEPARENT_FIELD_NUMBER: _ClassVar[int]
    ASSIGN_PREFILL_FIELD_NUMBER: _ClassVar[int]
    ANSWER_START_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_DIGEST_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    attempt: int
    expected_incarnation: int
    prompt_token_ids: _containers.RepeatedScalarFieldContainer[int]
    emitted_token_ids: _containers.RepeatedScalarFieldContainer[int]
    sampling: _common_pb2.SamplingParams
    eos_token_ids: _containers.RepeatedScalarFieldContainer[int]
    cache_namespace: str
    trace: bool
    sample_index: int
    codec: _common_pb2.KvCodec
    time_left_ns: int
    traceparent: str
    assign_prefill: AssignPrefill
    answer_start: int
    adapter_digest: str
    def __init__(self, request_id: _Optional[str] = ..., attempt: _Optional[int] = ..., expected_incarnation: _Optional[int] = ..., prompt_token_ids: _Optional[_Iterable[int]] = ..., emitted_token_ids: _Optional[_Iterable[int]] = ..., sampling: _Optional[_Union[_common_pb2.SamplingParams, _Mapping]] = ..., eos_token_ids: _Optional[_Iterable[int]] = ..., cache_namespace: _Optional[str] = ..., trace: bool = ..., sample_index: _Optional[int] = ..., codec: _Optional[_Union[_common_pb2.KvCodec, str]] = ..., time_left_ns: _Optional[int] = ..., traceparent: _Optional[str] = ..., assign_prefill: _Optional[_Union[AssignPrefill, _Mapping]] = ..., answer_start: _Optional[int] = ..., adapter_digest: _Optional[str] = ...) -> None: ...

class AssignPrefill(_message.Message):
    __slots__ = ("worker_id", "incarnation", "address", "data_addresses", "holder")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    DATA_ADDRESSES_FIELD_NUMBER: _ClassVar[int]
    HOLDER_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    incarnation: int
    address: str
    data_addresses: _containers.RepeatedCompositeFieldContainer[_kv_pb2.DataAddress]
    holder: _kv_pb2.KvHolder
    def __init__(self, worker_id: _Optional[str] = ..., incarnation: _Optional[int] = ..., address: _Optional[str] = ..., data_addresses: _Optional[_Iterable[_Union[_kv_pb2.DataAddress, _Mapping]]] = ..., holder: _Optional[_Union[_kv_pb2.KvHolder, _Mapping]] = ...) -> None: ...

class Evict(_message.Message):
    __slots__ = ("reason",)
    REASON_FIELD_NUMBER: _ClassVar[int]
    reason: str
    def __init__(self, reason: _Optional[str] = ...) -> None: ...

class CancelDecode(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class WorkerMessage(_message.Message):
    __slots__ = ("updates",)
    UPDATES_FIELD_NUMBER: _ClassVar[int]
    updates: _containers.RepeatedCompositeFieldContainer[SequenceUpdate]
    def __init__(self, updates: _Optional[_Iterable[_Union[SequenceUpdate, _Mapping]]] = ...) -> None: ...

class SequenceUpdate(_message.Message):
    __slots__ = ("sequence", "reserved", "need_prefill", "tokens", "refused", "done", "failed")
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    RESERVED_FIELD_NUMBER: _ClassVar[int]
    NEED_PREFILL_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    REFUSED_FIELD_NUMBER: _ClassVar[int]
    DONE_FIELD_NUMBER: _ClassVar[int]
    FAILED_FIELD_NUMBER: _ClassVar[int]
    sequence: int
    reserved: Reserved
    need_prefill: NeedPrefill
    tokens: Tokens
    refused: Refused
    done: DecodeDone
    failed: SequenceFailed
    def __init__(self, sequence: _Optional[int] = ..., reserved: _Optional[_Union[Reserved, _Mapping]] = ..., need_prefill: _Optional[_Union[NeedPrefill, _Mapping]] = ..., tokens: _Optional[_Union[Tokens, _Mapping]] = ..., refused: _Optional[_Union[Refused, _Mapping]] = ..., done: _Optional[_Union[DecodeDone, _Mapping]] = ..., failed: _Optional[_Union[SequenceFailed, _Mapping]] = ...) -> None: ...

class SequenceFailed(_message.Message):
    __slots__ = ("status", "trace_id")
    STATUS_FIELD_NUMBER: _ClassVar[int]
    TRACE_ID_FIELD_NUMBER: _ClassVar[int]
    status: bytes
    trace_id: str
    def __init__(self, status: _Optional[bytes] = ..., trace_id: _Optional[str] = ...) -> None: ...

class Reserved(_message.Message):
    __slots__ = ("blocks", "reservation_ns", "has_prompt")
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    RESERVATION_NS_FIELD_NUMBER: _ClassVar[int]
    HAS_PROMPT_FIELD_NUMBER: _ClassVar[int]
    blocks: int
    reservation_ns: int
    has_prompt: bool
    def __init__(self, blocks: _Optional[int] = ..., reservation_ns: _Optional[int] = ..., has_prompt: bool = ...) -> None: ...

class NeedPrefill(_message.Message):
    __slots__ = ("reason", "detail", "worker_id", "step_failed")
    class Reason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        REASON_UNSPECIFIED: _ClassVar[NeedPrefill.Reason]
        REASON_PREEMPTED: _ClassVar[NeedPrefill.Reason]
        REASON_PREFILL_FAILED: _ClassVar[NeedPrefill.Reason]
        REASON_PREFILL_REFUSED: _ClassVar[NeedPrefill.Reason]
        REASON_INCOMPATIBLE: _ClassVar[NeedPrefill.Reason]
        REASON_REST: _ClassVar[NeedPrefill.Reason]
    REASON_UNSPECIFIED: NeedPrefill.Reason
    REASON_PREEMPTED: NeedPrefill.Reason
    REASON_PREFILL_FAILED: NeedPrefill.Reason
    REASON_PREFILL_REFUSED: NeedPrefill.Reason
    REASON_INCOMPATIBLE: NeedPrefill.Reason
    REASON_REST: NeedPrefill.Reason
    REASON_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    STEP_FAILED_FIELD_NUMBER: _ClassVar[int]
    reason: NeedPrefill.Reason
    detail: str
    worker_id: str
    step_failed: bool
    def __init__(self, reason: _Optional[_Union[NeedPrefill.Reason, str]] = ..., detail: _Optional[str] = ..., worker_id: _Optional[str] = ..., step_failed: bool = ...) -> None: ...

class Tokens(_message.Message):
    __slots__ = ("first_index", "ids", "logprobs", "prefill_queue_ns", "prefill_compute_ns", "return_ns", "so_far", "prompt_logprobs", "handoff_ns", "first_step_ns")
    FIRST_INDEX_FIELD_NUMBER: _ClassVar[int]
    IDS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    PREFILL_QUEUE_NS_FIELD_NUMBER: _ClassVar[int]
    PREFILL_COMPUTE_NS_FIELD_NUMBER: _ClassVar[int]
    RETURN_NS_FIELD_NUMBER: _ClassVar[int]
    SO_FAR_FIELD_NUMBER: _ClassVar[int]
    PROMPT_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    HANDOFF_NS_FIELD_NUMBER: _ClassVar[int]
    FIRST_STEP_NS_FIELD_NUMBER: _ClassVar[int]
    first_index: int
    ids: _containers.RepeatedScalarFieldContainer[int]
    logprobs: _containers.RepeatedCompositeFieldContainer[_common_pb2.TokenLogprobs]
    prefill_queue_ns: int
    prefill_compute_ns: int
    return_ns: int
    so_far: DecodeDone
    prompt_logprobs: _common_pb2.PromptLogprobs
    handoff_ns: int
    first_step_ns: int
    def __init__(self, first_index: _Optional[int] = ..., ids: _Optional[_Iterable[int]] = ..., logprobs: _Optional[_Iterable[_Union[_common_pb2.TokenLogprobs, _Mapping]]] = ..., prefill_queue_ns: _Optional[int] = ..., prefill_compute_ns: _Optional[int] = ..., return_ns: _Optional[int] = ..., so_far: _Optional[_Union[DecodeDone, _Mapping]] = ..., prompt_logprobs: _Optional[_Union[_common_pb2.PromptLogprobs, _Mapping]] = ..., handoff_ns: _Optional[int] = ..., first_step_ns: _Optional[int] = ...) -> None: ...

class Refused(_message.Message):
    __slots__ = ("load", "reason")
    LOAD_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    load: WorkerLoad
    reason: str
    def __init__(self, load: _Optional[_Union[WorkerLoad, _Mapping]] = ..., reason: _Optional[str] = ...) -> None: ...

class WorkerLoad(_message.Message):
    __slots__ = ("kv_blocks_used", "kv_blocks_cached", "kv_blocks_total", "running", "waiting", "block_size", "queued_tokens", "prefix_tokens_looked_up", "prefix_tokens_found", "kv_disk_bytes")
    KV_BLOCKS_USED_FIELD_NUMBER: _ClassVar[int]
    KV_BLOCKS_CACHED_FIELD_NUMBER: _ClassVar[int]
    KV_BLOCKS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    WAITING_FIELD_NUMBER: _ClassVar[int]
    BLOCK_SIZE_FIELD_NUMBER: _ClassVar[int]
    QUEUED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PREFIX_TOKENS_LOOKED_UP_FIELD_NUMBER: _ClassVar[int]
    PREFIX_TOKENS_FOUND_FIELD_NUMBER: _ClassVar[int]
    KV_DISK_BYTES_FIELD_NUMBER: _ClassVar[int]
    kv_blocks_used: int
    kv_blocks_cached: int
    kv_blocks_total: int
    running: int
    waiting: int
    block_size: int
    queued_tokens: int
    prefix_tokens_looked_up: int
    prefix_tokens_found: int
    kv_disk_bytes: int
    def __init__(self, kv_blocks_used: _Optional[int] = ..., kv_blocks_cached: _Optional[int] = ..., kv_blocks_total: _Optional[int] = ..., running: _Optional[int] = ..., waiting: _Optional[int] = ..., block_size: _Optional[int] = ..., queued_tokens: _Optional[int] = ..., prefix_tokens_looked_up: _Optional[int] = ..., prefix_tokens_found: _Optional[int] = ..., kv_disk_bytes: _Optional[int] = ...) -> None: ...

class DecodeDone(_message.Message):
    __slots__ = ("reason", "usage", "handoff_exposed_ns", "decode_ns", "prefill_worker_id", "trace", "codec", "adapter_digest")
    REASON_FIELD_NUMBER: _ClassVar[int]
    USAGE_FIELD_NUMBER: _ClassVar[int]
    HANDOFF_EXPOSED_NS_FIELD_NUMBER: _ClassVar[int]
    DECODE_NS_FIELD_NUMBER: _ClassVar[int]
    PREFILL_WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    TRACE_FIELD_NUMBER: _ClassVar[int]
    CODEC_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_DIGEST_FIELD_NUMBER: _ClassVar[int]
    reason: _common_pb2.FinishReason
    usage: _common_pb2.Usage
    handoff_exposed_ns: int
    decode_ns: int
    prefill_worker_id: str
    trace: _kv_pb2.HandoffTrace
    codec: _common_pb2.KvCodec
    adapter_digest: str
    def __init__(self, reason: _Optional[_Union[_common_pb2.FinishReason, str]] = ..., usage: _Optional[_Union[_common_pb2.Usage, _Mapping]] = ..., handoff_exposed_ns: _Optional[int] = ..., decode_ns: _Optional[int] = ..., prefill_worker_id: _Optional[str] = ..., trace: _Optional[_Union[_kv_pb2.HandoffTrace, _Mapping]] = ..., codec: _Optional[_Union[_common_pb2.KvCodec, str]] = ..., adapter_digest: _Optional[str] = ...) -> None: ...

from overfill.v1 import common_pb2 as _common_pb2
from overfill.v1 import decode_pb2 as _decode_pb2
from overfill.v1 import kv_pb2 as _kv_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class LendRequest(_message.Message):
    __slots__ = ("start", "end")
    START_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    start: StartLend
    end: EndLend
    def __init__(self, start: _Optional[_Union[StartLend, _Mapping]] = ..., end: _Optional[_Union[EndLend, _Mapping]] = ...) -> None: ...

class StartLend(_message.Message):
    __slots__ = ("request_id", "transfer_id", "prompt_token_ids", "cache_namespace", "already_held_tokens", "expected_incarnation")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    TRANSFER_ID_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    CACHE_NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    ALREADY_HELD_TOKENS_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_INCARNATION_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    transfer_id: bytes
    prompt_token_ids: _containers.RepeatedScalarFieldContainer[int]
    cache_namespace: str
    already_held_tokens: int
    expected_incarnation: int
    def __init__(self, request_id: _Optional[str] = ..., transfer_id: _Optional[bytes] = ..., prompt_token_ids: _Optional[_Iterable[int]] = ..., cache_namespace: _Optional[str] = ..., already_held_tokens: _Optional[int] = ..., expected_incarnation: _Optional[int] = ...) -> None: ...

class EndLend(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class LendResponse(_message.Message):
    __slots__ = ("tokens",)
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    tokens: int
    def __init__(self, tokens: _Optional[int] = ...) -> None: ...

class DescribePrefillRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class DescribePrefillResponse(_message.Message):
    __slots__ = ("wire_version", "software_version", "worker_id", "incarnation", "model", "kv", "max_model_len", "codecs", "shm", "engine")
    WIRE_VERSION_FIELD_NUMBER: _ClassVar[int]
    SOFTWARE_VERSION_FIELD_NUMBER: _ClassVar[int]
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    KV_FIELD_NUMBER: _ClassVar[int]
    MAX_MODEL_LEN_FIELD_NUMBER: _ClassVar[int]
    CODECS_FIELD_NUMBER: _ClassVar[int]
    SHM_FIELD_NUMBER: _ClassVar[int]
    ENGINE_FIELD_NUMBER: _ClassVar[int]
    wire_version: int
    software_version: str
    worker_id: str
    incarnation: int
    model: _common_pb2.ModelIdentity
    kv: _common_pb2.KvSpec
    max_model_len: int
    codecs: _containers.RepeatedScalarFieldContainer[_common_pb2.KvCodec]
    shm: ShmOffer
    engine: str
    def __init__(self, wire_version: _Optional[int] = ..., software_version: _Optional[str] = ..., worker_id: _Optional[str] = ..., incarnation: _Optional[int] = ..., model: _Optional[_Union[_common_pb2.ModelIdentity, _Mapping]] = ..., kv: _Optional[_Union[_common_pb2.KvSpec, _Mapping]] = ..., max_model_len: _Optional[int] = ..., codecs: _Optional[_Iterable[_Union[_common_pb2.KvCodec, str]]] = ..., shm: _Optional[_Union[ShmOffer, _Mapping]] = ..., engine: _Optional[str] = ...) -> None: ...

class ShmOffer(_message.Message):
    __slots__ = ("name", "token")
    NAME_FIELD_NUMBER: _ClassVar[int]
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    name: str
    token: bytes
    def __init__(self, name: _Optional[str] = ..., token: _Optional[bytes] = ...) -> None: ...

class PrefillRequest(_message.Message):
    __slots__ = ("start", "ack", "release")
    START_FIELD_NUMBER: _ClassVar[int]
    ACK_FIELD_NUMBER: _ClassVar[int]
    RELEASE_FIELD_NUMBER: _ClassVar[int]
    start: StartPrefill
    ack: AckKv
    release: ReleaseKv
    def __init__(self, start: _Optional[_Union[StartPrefill, _Mapping]] = ..., ack: _Optional[_Union[AckKv, _Mapping]] = ..., release: _Optional[_Union[ReleaseKv, _Mapping]] = ...) -> None: ...

class StartPrefill(_message.Message):
    __slots__ = ("request_id", "attempt", "transfer_id", "prompt_token_ids", "sampling", "sample_first_token", "layers", "already_held_tokens", "codec", "expected_incarnation", "cache_namespace", "trace", "sample_index", "answer_start", "without_kv", "holder")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    TRANSFER_ID_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    SAMPLE_FIRST_TOKEN_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    ALREADY_HELD_TOKENS_FIELD_NUMBER: _ClassVar[int]
    CODEC_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_INCARNATION_FIELD_NUMBER: _ClassVar[int]
    CACHE_NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    TRACE_FIELD_NUMBER: _ClassVar[int]
    SAMPLE_INDEX_FIELD_NUMBER: _ClassVar[int]
    ANSWER_START_FIELD_NUMBER: _ClassVar[int]
    WITHOUT_KV_FIELD_NUMBER: _ClassVar[int]
    HOLDER_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    attempt: int
    transfer_id: bytes
    prompt_token_ids: _containers.RepeatedScalarFieldContainer[int]
    sampling: _common_pb2.SamplingParams
    sample_first_token: bool
    layers: _containers.RepeatedScalarFieldContainer[int]
    already_held_tokens: int
    codec: _common_pb2.KvCodec
    expected_incarnation: int
    cache_namespace: str
    trace: bool
    sample_index: int
    answer_start: int
    without_kv: bool
    holder: _kv_pb2.KvHolder
    def __init__(self, request_id: _Optional[str] = ..., attempt: _Optional[int] = ..., transfer_id: _Optional[bytes] = ..., prompt_token_ids: _Optional[_Iterable[int]] = ..., sampling: _Optional[_Union[_common_pb2.SamplingParams, _Mapping]] = ..., sample_first_token: bool = ..., layers: _Optional[_Iterable[int]] = ..., already_held_tokens: _Optional[int] = ..., codec: _Optional[_Union[_common_pb2.KvCodec, str]] = ..., expected_incarnation: _Optional[int] = ..., cache_namespace: _Optional[str] = ..., trace: bool = ..., sample_index: _Optional[int] = ..., answer_start: _Optional[int] = ..., without_kv: bool = ..., holder: _Optional[_Union[_kv_pb2.KvHolder, _Mapping]] = ...) -> None: ...

class AckKv(_message.Message):
    __slots__ = ("ranges",)
    RANGES_FIELD_NUMBER: _ClassVar[int]
    ranges: _containers.RepeatedCompositeFieldContainer[_kv_pb2.KvRange]
    def __init__(self, ranges: _Optional[_Iterable[_Union[_kv_pb2.KvRange, _Mapping]]] = ...) -> None: ...

class ReleaseKv(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class PrefillResponse(_message.Message):
    __slots__ = ("scheduled", "ready", "first_token", "done", "kv")
    SCHEDULED_FIELD_NUMBER: _ClassVar[int]
    READY_FIELD_NUMBER: _ClassVar[int]
    FIRST_TOKEN_FIELD_NUMBER: _ClassVar[int]
    DONE_FIELD_NUMBER: _ClassVar[int]
    KV_FIELD_NUMBER: _ClassVar[int]
    scheduled: PrefillScheduled
    ready: RangesReady
    first_token: _decode_pb2.Tokens
    done: PrefillDone
    kv: bytes
    def __init__(self, scheduled: _Optional[_Union[PrefillScheduled, _Mapping]] = ..., ready: _Optional[_Union[RangesReady, _Mapping]] = ..., first_token: _Optional[_Union[_decode_pb2.Tokens, _Mapping]] = ..., done: _Optional[_Union[PrefillDone, _Mapping]] = ..., kv: _Optional[bytes] = ...) -> None: ...

class PrefillScheduled(_message.Message):
    __slots__ = ("queue_ns", "cached_tokens", "peer_tokens", "disk_tokens")
    QUEUE_NS_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PEER_TOKENS_FIELD_NUMBER: _ClassVar[int]
    DISK_TOKENS_FIELD_NUMBER: _ClassVar[int]
    queue_ns: int
    cached_tokens: int
    peer_tokens: int
    disk_tokens: int
    def __init__(self, queue_ns: _Optional[int] = ..., cached_tokens: _Optional[int] = ..., peer_tokens: _Optional[int] = ..., disk_tokens: _Optional[int] = ...) -> None: ...

class RangesReady(_message.Message):
    __slots__ = ("token_start", "token_end")
    TOKEN_START_FIELD_NUMBER: _ClassVar[int]
    TOKEN_END_FIELD_NUMBER: _ClassVar[int]
    token_start: int
    token_end: int
    def __init__(self, token_start: _Optional[int] = ..., token_end: _Optional[int] = ...) -> None: ...

class PrefillDone(_message.Message):
    __slots__ = ("trace",)
    TRACE_FIELD_NUMBER: _ClassVar[int]
    trace: _kv_pb2.PrefillTrace
    def __init__(self, trace: _Optional[_Union[_kv_pb2.PrefillTrace, _Mapping]] = ...) -> None: ...

class PullKvRequest(_message.Message):
    __slots__ = ("transfer_id", "attempt", "ranges", "link_id", "stream")
    TRANSFER_ID_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    RANGES_FIELD_NUMBER: _ClassVar[int]
    LINK_ID_FIELD_NUMBER: _ClassVar[int]
    STREAM_FIELD_NUMBER: _ClassVar[int]
    transfer_id: bytes
    attempt: int
    ranges: _containers.RepeatedCompositeFieldContainer[_kv_pb2.KvRange]
    link_id: bytes
    stream: int
    def __init__(self, transfer_id: _Optional[bytes] = ..., attempt: _Optional[int] = ..., ranges: _Optional[_Iterable[_Union[_kv_pb2.KvRange, _Mapping]]] = ..., link_id: _Optional[bytes] = ..., stream: _Optional[int] = ...) -> None: ...

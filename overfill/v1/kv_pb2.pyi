from overfill.v1 import common_pb2 as _common_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class KvRange(_message.Message):
    __slots__ = ("layer_start", "layer_end", "token_start", "token_end", "head_start", "head_end")
    LAYER_START_FIELD_NUMBER: _ClassVar[int]
    LAYER_END_FIELD_NUMBER: _ClassVar[int]
    TOKEN_START_FIELD_NUMBER: _ClassVar[int]
    TOKEN_END_FIELD_NUMBER: _ClassVar[int]
    HEAD_START_FIELD_NUMBER: _ClassVar[int]
    HEAD_END_FIELD_NUMBER: _ClassVar[int]
    layer_start: int
    layer_end: int
    token_start: int
    token_end: int
    head_start: int
    head_end: int
    def __init__(self, layer_start: _Optional[int] = ..., layer_end: _Optional[int] = ..., token_start: _Optional[int] = ..., token_end: _Optional[int] = ..., head_start: _Optional[int] = ..., head_end: _Optional[int] = ...) -> None: ...

class DataAddress(_message.Message):
    __slots__ = ("address", "first_kv_head", "num_kv_heads")
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    FIRST_KV_HEAD_FIELD_NUMBER: _ClassVar[int]
    NUM_KV_HEADS_FIELD_NUMBER: _ClassVar[int]
    address: str
    first_kv_head: int
    num_kv_heads: int
    def __init__(self, address: _Optional[str] = ..., first_kv_head: _Optional[int] = ..., num_kv_heads: _Optional[int] = ...) -> None: ...

class KvHolder(_message.Message):
    __slots__ = ("worker_id", "incarnation", "address", "data_addresses", "tokens")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    DATA_ADDRESSES_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    incarnation: int
    address: str
    data_addresses: _containers.RepeatedCompositeFieldContainer[DataAddress]
    tokens: int
    def __init__(self, worker_id: _Optional[str] = ..., incarnation: _Optional[int] = ..., address: _Optional[str] = ..., data_addresses: _Optional[_Iterable[_Union[DataAddress, _Mapping]]] = ..., tokens: _Optional[int] = ...) -> None: ...

class KvChunk(_message.Message):
    __slots__ = ("transfer_id", "attempt", "range", "dtype", "codec", "scales", "payload", "shared", "also", "checksum")
    TRANSFER_ID_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    RANGE_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    CODEC_FIELD_NUMBER: _ClassVar[int]
    SCALES_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    SHARED_FIELD_NUMBER: _ClassVar[int]
    ALSO_FIELD_NUMBER: _ClassVar[int]
    CHECKSUM_FIELD_NUMBER: _ClassVar[int]
    transfer_id: bytes
    attempt: int
    range: KvRange
    dtype: _common_pb2.DType
    codec: _common_pb2.KvCodec
    scales: bytes
    payload: bytes
    shared: SharedPayload
    also: _containers.RepeatedCompositeFieldContainer[KvChunk]
    checksum: int
    def __init__(self, transfer_id: _Optional[bytes] = ..., attempt: _Optional[int] = ..., range: _Optional[_Union[KvRange, _Mapping]] = ..., dtype: _Optional[_Union[_common_pb2.DType, str]] = ..., codec: _Optional[_Union[_common_pb2.KvCodec, str]] = ..., scales: _Optional[bytes] = ..., payload: _Optional[bytes] = ..., shared: _Optional[_Union[SharedPayload, _Mapping]] = ..., also: _Optional[_Iterable[_Union[KvChunk, _Mapping]]] = ..., checksum: _Optional[int] = ...) -> None: ...

class SharedPayload(_message.Message):
    __slots__ = ("slot", "length")
    SLOT_FIELD_NUMBER: _ClassVar[int]
    LENGTH_FIELD_NUMBER: _ClassVar[int]
    slot: int
    length: int
    def __init__(self, slot: _Optional[int] = ..., length: _Optional[int] = ...) -> None: ...

class PrefillTrace(_message.Message):
    __slots__ = ("layer_start_ns", "layer_end_ns", "first_kv_sent_ns", "last_kv_sent_ns", "first_token_sent_ns", "last_ack_ns")
    LAYER_START_NS_FIELD_NUMBER: _ClassVar[int]
    LAYER_END_NS_FIELD_NUMBER: _ClassVar[int]
    FIRST_KV_SENT_NS_FIELD_NUMBER: _ClassVar[int]
    LAST_KV_SENT_NS_FIELD_NUMBER: _ClassVar[int]
    FIRST_TOKEN_SENT_NS_FIELD_NUMBER: _ClassVar[int]
    LAST_ACK_NS_FIELD_NUMBER: _ClassVar[int]
    layer_start_ns: _containers.RepeatedScalarFieldContainer[int]
    layer_end_ns: _containers.RepeatedScalarFieldContainer[int]
    first_kv_sent_ns: int
    last_kv_sent_ns: int
    first_token_sent_ns: int
    last_ack_ns: int
    def __init__(self, layer_start_ns: _Optional[_Iterable[int]] = ..., layer_end_ns: _Optional[_Iterable[int]] = ..., first_kv_sent_ns: _Optional[int] = ..., last_kv_sent_ns: _Optional[int] = ..., first_token_sent_ns: _Optional[int] = ..., last_ack_ns: _Optional[int] = ...) -> None: ...

class HandoffTrace(_message.Message):
    __slots__ = ("first_token_received_ns", "first_kv_received_ns", "last_kv_received_ns", "kv_bytes", "kv_chunks", "prefill", "broken_streams", "cached_tokens", "held_tokens", "shared_bytes", "peer_tokens", "disk_tokens")
    FIRST_TOKEN_RECEIVED_NS_FIELD_NUMBER: _ClassVar[int]
    FIRST_KV_RECEIVED_NS_FIELD_NUMBER: _ClassVar[int]
    LAST_KV_RECEIVED_NS_FIELD_NUMBER: _ClassVar[int]
    KV_BYTES_FIELD_NUMBER: _ClassVar[int]
    KV_CHUNKS_FIELD_NUMBER: _ClassVar[int]
    PREFILL_FIELD_NUMBER: _ClassVar[int]
    BROKEN_STREAMS_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    HELD_TOKENS_FIELD_NUMBER: _ClassVar[int]
    SHARED_BYTES_FIELD_NUMBER: _ClassVar[int]
    PEER_TOKENS_FIELD_NUMBER: _ClassVar[int]
    DISK_TOKENS_FIELD_NUMBER: _ClassVar[int]
    first_token_received_ns: int
    first_kv_received_ns: int
    last_kv_received_ns: int
    kv_bytes: int
    kv_chunks: int
    prefill: PrefillTrace
    broken_streams: int
    cached_tokens: int
    held_tokens: int
    shared_bytes: int
    peer_tokens: int
    disk_tokens: int
    def __init__(self, first_token_received_ns: _Optional[int] = ..., first_kv_received_ns: _Optional[int] = ..., last_kv_received_ns: _Optional[int] = ..., kv_bytes: _Optional[int] = ..., kv_chunks: _Optional[int] = ..., prefill: _Optional[_Union[PrefillTrace, _Mapping]] = ..., broken_streams: _Optional[int] = ..., cached_tokens: _Optional[int] = ..., held_tokens: _Optional[int] = ..., shared_bytes: _Optional[int] = ..., peer_tokens: _Optional[int] = ..., disk_tokens: _Optional[int] = ...) -> None: ...

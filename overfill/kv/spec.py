"""Geometry of KV, which two processes must agree on before keys and values travel. No torch."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, cast

from overfill.request.messages import shared_fields
from overfill.v1 import common_pb2

DTypeName = Literal["float32", "bfloat16", "float16"]

KvCacheDtype = Literal["auto", "int8"]
"""Element type in which a decode worker stores KV; "auto" is the dtype of its activations."""

Quantization = Literal["none", "int8"]
"""Format to which a decoder's weights are rounded on load."""

DTYPE_TO_PROTO: dict[str, common_pb2.DType] = {
    "float32": common_pb2.DTYPE_FLOAT32,
    "bfloat16": common_pb2.DTYPE_BFLOAT16,
    "float16": common_pb2.DTYPE_FLOAT16,
}
DTYPE_FROM_PROTO: dict[int, DTypeName] = {v: k for k, v in DTYPE_TO_PROTO.items()}  # type: ignore[misc]
DEFAULT_BLOCK_SIZE = 16
"""Tokens per block in OverFill's engine, unless the settings say otherwise."""
SCALE_BYTES = 4
"""Bytes of the float32 scale of a key or value vector."""

DTYPE_BYTES: dict[str, int] = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, slots=True)
class RopeSpec:
    """All parameters of the rotation of keys. The fields are those of ``RopeSpec`` in common.proto."""

    type: Literal["default", "linear", "llama3", "yarn"] = "default"
    theta: float = 10000.0
    factor: float = 1.0
    low_freq_factor: float = 0.0
    high_freq_factor: float = 0.0
    original_max_positions: int = 0
    beta_fast: float = 0.0
    beta_slow: float = 0.0
    attention_factor: float = 1.0
    truncate: bool = False

    def to_proto(self) -> common_pb2.RopeSpec:
        return common_pb2.RopeSpec(**asdict(self))

    @classmethod
    def from_proto(cls, message: common_pb2.RopeSpec) -> RopeSpec:
        return cls(**shared_fields(cls, message))


@dataclass(frozen=True, slots=True)
class KvSpec:
    """Shape and element type of the KV cache that a full model produces.

    One token takes ``2 * num_layers * num_kv_heads * head_dim`` elements of ``dtype``.
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: DTypeName
    rope: RopeSpec

    @property
    def token_layer_bytes(self) -> int:
        """Bytes of one token's keys and values in one layer."""
        return 2 * self.num_kv_heads * self.head_dim * DTYPE_BYTES[self.dtype]

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's keys and values in all layers."""
        return self.num_layers * self.token_layer_bytes

    def to_proto(self) -> common_pb2.KvSpec:
        return common_pb2.KvSpec(
            num_layers=self.num_layers,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            dtype=DTYPE_TO_PROTO[self.dtype],
            rope=self.rope.to_proto(),
        )

    @classmethod
    def from_proto(cls, message: common_pb2.KvSpec) -> KvSpec:
        # An unknown type must not fail here: the handshake names it as a difference.
        dtype = DTYPE_FROM_PROTO.get(message.dtype, cast(DTypeName, f"unknown ({message.dtype})"))
        return cls(**shared_fields(cls, message) | {"dtype": dtype, "rope": RopeSpec.from_proto(message.rope)})

    def flat(self) -> dict[str, Any]:
        """Every field by its dotted name, for comparisons and messages."""
        own: dict[str, Any] = {f"kv.{f.name}": getattr(self, f.name) for f in fields(self) if f.name != "rope"}
        return own | {f"kv.rope.{f.name}": getattr(self.rope, f.name) for f in fields(self.rope)}

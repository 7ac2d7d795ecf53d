"""Names that answers, flags and metrics use: of the wire's enum values, of formats, and of times. No torch."""

from __future__ import annotations

import re
from typing import Literal, Protocol

from overfill.v1 import common_pb2

ADAPTER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
"""What an adapter may be called. Names of tiers have this form too."""

ADAPTER_NAME_RULE = "1 to 64 letters, digits and . _ -, of which the first is a letter or digit"

FinishReason = Literal["stop", "length", "tool_calls"]

FINISH_REASONS: dict[int, FinishReason] = {
    common_pb2.FINISH_REASON_STOP: "stop",
    common_pb2.FINISH_REASON_LENGTH: "length",
    common_pb2.FINISH_REASON_TOOL_CALLS: "tool_calls",
}

ToolCallParser = Literal["auto", "hermes", "llama3_json", "pythonic", "mistral", "qwen3_coder"]
"""Names of vLLM's parsers for the formats of tool calls; "auto" chooses by the chat template."""

CodecName = Literal["raw", "int8"]

CODECS: dict[CodecName, common_pb2.KvCodec] = {
    "raw": common_pb2.KV_CODEC_RAW,
    "int8": common_pb2.KV_CODEC_INT8,
}
CODEC_NAMES: dict[int, CodecName] = {codec: name for name, codec in CODECS.items()}
"""Use ``get``: it returns None for an unspecified codec or one that this version does not know."""

KV_SOURCES = ("memory", "peer", "disk")
"""Where the KV of cached prompt tokens was: in the prefill worker's memory, at another worker, or on disk."""

TTFT_PARTS = (
    "router_queue",
    "decode_reservation",
    "prefill_queue",
    "prefill_compute",
    "handoff",
    "first_step",
    "return_path",
)
"""Fields of ``Timing`` that add up to its ``ttft``, in the order in which they happen."""

DECODER_FIRST_PARTS = ("handoff", "first_step")
"""The parts of ``TTFT_PARTS`` that exist only if the decoder samples the first token."""


class CachedTokens(Protocol):
    """Numbers of cached prompt tokens, as ``common_pb2.Usage`` has them."""

    @property
    def cached_tokens(self) -> int: ...
    @property
    def peer_tokens(self) -> int: ...
    @property
    def disk_tokens(self) -> int: ...


def cached_by_source(tokens: CachedTokens) -> dict[str, int]:
    """Divides the cached tokens among ``KV_SOURCES``."""
    peer, disk = tokens.peer_tokens, tokens.disk_tokens
    return dict(zip(KV_SOURCES, (tokens.cached_tokens - peer - disk, peer, disk), strict=True))

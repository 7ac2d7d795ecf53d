"""How KV is made smaller for the way: int8 and fp8 with one scale for each key and each value vector.

A vector is one head of one token in one layer. Its largest magnitude becomes the largest number of the code: an int8
element is off by half a step at most, 1/254 of that magnitude; an fp8 one by 1/16 of itself, or, when it is small, by
1/(448 * 1024) of that magnitude. Elements of an element type of their own come on top (bfloat16: 1/256 of the element).
"""

from __future__ import annotations

import numpy as np
import torch

from overfill.errors import TransferFailed
from overfill.kv.spec import DTypeName
from overfill.kv.tensors import TORCH_DTYPES
from overfill.kv.wire import Buffer
from overfill.v1 import common_pb2

_CODES: dict[int, tuple[torch.dtype, float]] = {
    common_pb2.KV_CODEC_INT8: (torch.int8, 127.0),
    common_pb2.KV_CODEC_FP8: (torch.float8_e4m3fn, 448.0),
}


def quantise(vectors: torch.Tensor, codec: common_pb2.KvCodec) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales [..., 1] float32 and codes [..., head_dim] of ``vectors`` [..., head_dim], whatever their type."""
    kind, largest = _CODES[codec]
    wide = vectors.float()
    scales = wide.abs().amax(-1, keepdim=True) / largest
    # A vector of zeros has scale 0; anything may divide it.
    codes = wide / torch.where(scales > 0, scales, 1.0)
    if kind is torch.int8:
        codes = codes.round_().clamp_(-largest, largest)
    return scales, codes.to(kind)


def restore(scales: torch.Tensor, codes: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What codes and scales stand for, as ``dtype``."""
    return (codes.float() * scales).to(dtype)


def encode(codec: common_pb2.KvCodec, dtype: DTypeName, head_dim: int, raw: memoryview) -> tuple[Buffer, Buffer]:
    """Scales and payload, as they travel, of ``raw``, writable vectors of ``head_dim`` elements of ``dtype``."""
    vectors = torch.frombuffer(raw, dtype=TORCH_DTYPES[dtype]).view(-1, head_dim)
    scales, codes = quantise(vectors, codec)
    return scales.numpy().reshape(-1).view(np.uint8).data, codes.view(torch.uint8).numpy().reshape(-1).data


def check_scales(scales: Buffer) -> None:
    """Raises TransferFailed when a scale is no finite number."""
    if not np.isfinite(np.frombuffer(scales, dtype=np.float32)).all():
        raise TransferFailed("a chunk has a scale that is no finite number")


def decode(codec: common_pb2.KvCodec, dtype: DTypeName, head_dim: int, scales: Buffer, payload: Buffer) -> Buffer:
    """The vectors that ``encode`` was given, nearly, as bytes.

    Raises:
        TransferFailed: a scale is no finite number.
    """
    kind, _ = _CODES[codec]
    check_scales(scales)
    # Through copies: torch refuses to look at a read-only buffer without a warning.
    factors = torch.frombuffer(bytearray(scales), dtype=torch.float32).unsqueeze(1)
    codes = torch.frombuffer(bytearray(payload), dtype=torch.uint8).view(kind).view(-1, head_dim)
    return restore(factors, codes, TORCH_DTYPES[dtype]).view(torch.uint8).numpy().reshape(-1).data

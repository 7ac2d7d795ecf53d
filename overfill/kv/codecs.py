"""The codec that compresses KV: int8, with one scale for each key and each value vector.

A vector is one head of one token in one layer. Its largest magnitude maps to 127. The error of an element is at most
half a step: 1/254 of that magnitude. Rounding to the KV's own dtype comes on top (bfloat16: 1/256 of the element).
"""

from __future__ import annotations

import numpy as np
import torch

from overfill.errors import TransferFailed
from overfill.kv.chunks import Buffer
from overfill.kv.spec import DTypeName
from overfill.kv.tensors import TORCH_DTYPES


def quantise(vectors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales [..., 1] float32 and int8 codes [..., head_dim] of ``vectors`` [..., head_dim] of any float dtype."""
    wide = vectors.float()
    scales = wide.abs().amax(-1, keepdim=True) / 127
    # The scale of a zero vector is 0; divide by 1 instead.
    codes = (wide / torch.where(scales > 0, scales, 1.0)).round_().clamp_(-127, 127)
    return scales, codes.to(torch.int8)


def restore(scales: torch.Tensor, codes: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The vectors that ``scales`` and ``codes`` represent, as ``dtype``."""
    return (codes.float() * scales).to(dtype)


def encode(dtype: DTypeName, head_dim: int, raw: memoryview) -> tuple[Buffer, Buffer]:
    """Encodes vectors of ``head_dim`` elements of ``dtype`` into scales and payload.

    ``raw`` must be writable, because torch warns about read-only buffers.
    """
    vectors = torch.frombuffer(raw, dtype=TORCH_DTYPES[dtype]).view(-1, head_dim)
    scales, codes = quantise(vectors)
    return scales.numpy().reshape(-1).view(np.uint8).data, codes.view(torch.uint8).numpy().reshape(-1).data


def check_scales(scales: Buffer) -> None:
    """Raises TransferFailed if a scale is not a finite number."""
    if not np.isfinite(np.frombuffer(scales, dtype=np.float32)).all():
        raise TransferFailed("a chunk has a scale that is not a finite number")


def decode(dtype: DTypeName, head_dim: int, scales: Buffer, payload: Buffer) -> Buffer:
    """Decodes vectors, as bytes of ``dtype``; the inverse of ``encode`` up to rounding.

    Raises:
        TransferFailed: a scale is not a finite number.
    """
    check_scales(scales)
    # The copies avoid torch's warning about read-only buffers.
    factors = torch.frombuffer(bytearray(scales), dtype=torch.float32).unsqueeze(1)
    codes = torch.frombuffer(bytearray(payload), dtype=torch.int8).view(-1, head_dim)
    return restore(factors, codes, TORCH_DTYPES[dtype]).view(torch.uint8).numpy().reshape(-1).data

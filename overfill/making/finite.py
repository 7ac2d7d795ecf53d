"""Finds NaN and infinity in the bytes of a checkpoint's tensors."""

from __future__ import annotations

from typing import Any

import numpy as np

from overfill.errors import InvalidPair
from overfill.model.digest import StoredTensor

_MASKS: dict[str, np.unsignedinteger[Any]] = {
    "F64": np.uint64(0x7FF0_0000_0000_0000),
    "F32": np.uint32(0x7F80_0000),
    "BF16": np.uint16(0x7F80),
    "F16": np.uint16(0x7C00),
    "F8_E4M3": np.uint8(0x7F),
    "F8_E5M2": np.uint8(0x7C),
}
"""The bits that are all set in NaN and infinity, by dtype in a safetensors file."""


def check_finite(tensor: StoredTensor, data: bytes | memoryview) -> None:
    """Raises InvalidPair if ``data``, a part of ``tensor``, holds NaN or infinity. Integers are always finite."""
    if (mask := _MASKS.get(tensor.dtype)) is None:
        return
    if bool(((np.frombuffer(data, mask.dtype) & mask) == mask).any()):
        raise InvalidPair(f"{tensor.file}: tensor {tensor.name} holds NaN or infinity; the checkpoint is damaged")

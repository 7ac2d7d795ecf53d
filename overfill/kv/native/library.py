"""Host tensors of a KV cache, copied by native code: all chunks of a message in one call, hashed while they are copied.

Mirrors the structures of ``kv.cpp``. Other threads run during a call.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import struct
from collections.abc import Mapping, Sequence
from ctypes import POINTER, Structure, c_int, c_int64, c_void_p
from pathlib import Path

import numpy as np
import torch

from overfill.kv.chunks import Chunk, digest, is_damaged
from overfill.kv.store import DeviceEvent, LayerTargets
from overfill.kv.tensors import NumpyTensors
from overfill.process.compiled import CannotBuild, compiled_library

log = logging.getLogger(__name__)

SOURCE = Path(__file__).parent / "kv.cpp"
FLAGS = ("-mavx2",)
_SHORT = 240  # bytes of header and payload up to which XXH3 is another function, which kv.cpp lacks
_CHUNK = struct.Struct("<6qQQq64s")  # OvfChunk
_CHECKSUM = struct.Struct("<Q")
_CHECKSUM_AT = 7 * 8


class _OvfCache(Structure):
    """``OvfCache`` of kv.cpp."""

    _fields_ = [
        *((name, c_void_p) for name in ("k", "v")),
        *((name, c_int64) for name in ("layers", "blocks", "block_size", "heads", "vector_bytes")),
    ]


@functools.cache
def load() -> ctypes.CDLL | None:
    """The library, compiled on first use; None if it cannot run here. Logs the reason once."""
    capabilities: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    if not capabilities.get("avx2"):
        log.warning("KV is copied without native code, which is slower: the CPU lacks avx2")
        return None
    try:
        library = ctypes.CDLL(str(compiled_library(SOURCE, FLAGS)))
    except (CannotBuild, OSError) as error:
        log.warning("KV is copied without native code, which is slower: %s", error)
        return None
    library.ovf_kv_gather.restype = c_int
    library.ovf_kv_gather.argtypes = [POINTER(_OvfCache), c_void_p, c_int64, c_void_p, c_int64]
    library.ovf_kv_scatter.restype = c_int64
    library.ovf_kv_scatter.argtypes = [*library.ovf_kv_gather.argtypes, c_void_p, c_int64, c_void_p]
    return library


class NativeTensors(NumpyTensors):
    """``NumpyTensors`` whose ``read`` and ``write`` are native code."""

    def __init__(self, native: ctypes.CDLL, k: torch.Tensor, v: torch.Tensor) -> None:
        super().__init__(k, v)
        self._native = native
        self._cache = _OvfCache(k.data_ptr(), v.data_ptr(), *k.shape[:-1], self._vector_bytes)

    def read(
        self, block_table: Sequence[int], chunks: Sequence[Chunk], after: Mapping[int, DeviceEvent | None]
    ) -> None:
        table = np.asarray(block_table, dtype=np.int64)
        packed = self._packed(chunks)
        if self._native.ovf_kv_gather(self._cache, table.ctypes.data, len(table), _address(packed), len(chunks)):
            raise IndexError("a chunk lies outside the cache or the sequence")
        for index, chunk in enumerate(chunks):
            if _is_short(chunk):
                chunk.checksum = digest(chunk.header, chunk.payload)
            elif chunk.header:
                (chunk.checksum,) = _CHECKSUM.unpack_from(packed, index * _CHUNK.size + _CHECKSUM_AT)

    def write(self, block_table: Sequence[int], targets: LayerTargets, chunks: Sequence[Chunk]) -> int:
        for index, chunk in enumerate(chunks):
            if _is_short(chunk) and is_damaged(chunk):
                chunks = chunks[:index]
                break
        table = np.asarray(block_table, dtype=np.int64)
        packed = self._packed(chunks)
        written: int = self._native.ovf_kv_scatter(
            self._cache,
            *(table.ctypes.data, len(table), _address(packed), len(chunks)),
            *(targets.starts.ctypes.data, len(targets.starts) - 1, targets.targets.ctypes.data),
        )
        if written < 0:
            raise IndexError("a chunk lies outside the cache or the sequence")
        return written

    def _packed(self, chunks: Sequence[Chunk]) -> bytearray:
        """``OvfChunk`` of each chunk."""
        packed = bytearray(_CHUNK.size * len(chunks))
        for index, chunk in enumerate(chunks):
            if len(chunk.payload) != chunk.range.num_vectors * self._vector_bytes:
                raise IndexError(f"a payload of {len(chunk.payload)} bytes does not fit {chunk.range}")
            header_bytes = 0 if _is_short(chunk) else len(chunk.header)
            _CHUNK.pack_into(
                packed,
                index * _CHUNK.size,
                *(*chunk.range, _address(chunk.payload), chunk.checksum, header_bytes, chunk.header),
            )
        return packed


def _is_short(chunk: Chunk) -> bool:
    return bool(chunk.header) and len(chunk.header) + len(chunk.payload) <= _SHORT


def _address(data: bytes | bytearray | memoryview) -> int:
    address: int = np.frombuffer(data, dtype=np.uint8).__array_interface__["data"][0]
    return address

"""The native half of ``kv.host``: whole messages of chunks at once, their checksums computed while they are copied.

Mirrors the structures of ``kv.cpp``. Other threads run meanwhile.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import struct
from collections.abc import Sequence
from ctypes import POINTER, Structure, c_int, c_int64, c_void_p
from pathlib import Path

import numpy as np
import torch

from overfill.kv.pieces import Piece, digest, is_damaged
from overfill.process.compiled import CannotBuild, compiled_library

log = logging.getLogger(__name__)

_SOURCE = Path(__file__).parent / "kv.cpp"
_FLAGS = ("-mavx2",)
_SHORT = 240  # bytes up to which XXH3 is another function, which is left to Python
_PIECE = struct.Struct("<6qQQq64s")  # OvfPiece
_CHECKSUM = struct.Struct("<Q")
_CHECKSUM_AT = 7 * 8


class Cells(Structure):
    """``OvfCells``."""

    _fields_ = [
        *((name, c_void_p) for name in ("k", "v")),
        *((name, c_int64) for name in ("layers", "blocks", "block_size", "heads", "cell")),
    ]


class Rows:
    """For each full-model layer, the layers of a cache that take it.

    Args:
        rows: ``rows[layer]``; layers that are left out are not taken.
    """

    def __init__(self, rows: dict[int, Sequence[int]]) -> None:
        taken = [rows.get(layer, ()) for layer in range(max(rows) + 1)]
        self.starts = np.cumsum([0, *map(len, taken)], dtype=np.int64)
        self.targets = np.array([target for targets in taken for target in targets], dtype=np.int64)

    def __getitem__(self, layer: int) -> Sequence[int]:
        return self.targets[self.starts[layer] : self.starts[layer + 1]].tolist()  # type: ignore[no-any-return]


@functools.cache
def load() -> ctypes.CDLL | None:
    """The library, compiled if need be; None where it cannot run. The reason is logged, once."""
    capabilities: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    if not capabilities.get("avx2"):
        log.warning("KV is copied without native code, which is slower: the CPU lacks avx2")
        return None
    try:
        library = ctypes.CDLL(str(compiled_library(_SOURCE, _FLAGS)))
    except (CannotBuild, OSError) as error:
        log.warning("KV is copied without native code, which is slower: %s", error)
        return None
    library.ovf_kv_gather.restype = c_int
    library.ovf_kv_gather.argtypes = [POINTER(Cells), c_void_p, c_int64, c_void_p, c_int64]
    library.ovf_kv_scatter.restype = c_int64
    library.ovf_kv_scatter.argtypes = [*library.ovf_kv_gather.argtypes, c_void_p, c_int64, c_void_p]
    return library


class NativeCells:
    """Keys and values [layers, blocks, block_size, heads, head_dim] on the CPU."""

    def __init__(self, library: ctypes.CDLL, k: torch.Tensor, v: torch.Tensor) -> None:
        self._library = library
        self._tensors = k, v  # which own the memory
        self._cell = k.shape[-1] * k.element_size()
        self._cells = Cells(k.data_ptr(), v.data_ptr(), *k.shape[:-1], self._cell)

    def read(self, block_table: Sequence[int], pieces: Sequence[Piece]) -> None:
        """As ``KvCache.read_pieces``."""
        table = np.asarray(block_table, dtype=np.int64)
        packed = self._packed(pieces)
        if self._library.ovf_kv_gather(self._cells, table.ctypes.data, len(table), _address(packed), len(pieces)):
            raise IndexError("a piece lies outside the cache or the sequence")
        for index, piece in enumerate(pieces):
            if _is_short(piece):
                piece.checksum = digest(piece.header, piece.payload)
            elif piece.header:
                (piece.checksum,) = _CHECKSUM.unpack_from(packed, index * _PIECE.size + _CHECKSUM_AT)

    def write(self, block_table: Sequence[int], rows: Rows, pieces: Sequence[Piece]) -> int:
        """As ``KvCache.write_pieces``."""
        for index, piece in enumerate(pieces):
            if _is_short(piece) and is_damaged(piece):
                pieces = pieces[:index]
                break
        table = np.asarray(block_table, dtype=np.int64)
        packed = self._packed(pieces)
        written: int = self._library.ovf_kv_scatter(
            self._cells,
            *(table.ctypes.data, len(table), _address(packed), len(pieces)),
            *(rows.starts.ctypes.data, len(rows.starts) - 1, rows.targets.ctypes.data),
        )
        if written < 0:
            raise IndexError("a piece lies outside the cache or the sequence")
        return written

    def _packed(self, pieces: Sequence[Piece]) -> bytearray:
        packed = bytearray(_PIECE.size * len(pieces))
        for index, piece in enumerate(pieces):
            if len(piece.payload) != 2 * piece.box.cells * self._cell:
                raise IndexError(f"a payload of {len(piece.payload)} bytes does not fit {piece.box}")
            size = 0 if _is_short(piece) else len(piece.header)
            _PIECE.pack_into(
                packed,
                index * _PIECE.size,
                *(*piece.box.as_tuple(), _address(piece.payload), piece.checksum, size, piece.header),
            )
        return packed


def _is_short(piece: Piece) -> bool:
    return bool(piece.header) and len(piece.header) + len(piece.payload) <= _SHORT


def _address(data: bytes | bytearray | memoryview) -> int:
    address: int = np.frombuffer(data, dtype=np.uint8).__array_interface__["data"][0]
    return address

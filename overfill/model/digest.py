"""Digests of checkpoints. Reads safetensors files as bytes; knows no torch and no model.

The digest of a checkpoint is SHA-256 over its tensors in name order (by UTF-8 bytes). Each tensor contributes

====================  =====================================================================
``len(name)``         unsigned 64-bit little-endian, of the UTF-8 bytes
``name``              UTF-8
``len(dtype)``        unsigned 64-bit little-endian
``dtype``             ASCII, as safetensors spells it: ``F32``, ``BF16``, ``F16``, ...
``rank``              unsigned 64-bit little-endian
``shape``             ``rank`` unsigned 64-bit little-endian numbers
``data``              the elements, row-major, little-endian; its length follows from dtype and shape
====================  =====================================================================

so that the digest depends neither on the division into files nor on metadata.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from overfill.errors import InvalidPair
from overfill.model.config import check_link
from overfill.telemetry.progress import Report, silent

_READ_BYTES = 1 << 20
_MAX_HEADER_BYTES = 100 << 20
_MAX_DIMENSIONS = 16
_MAX_MESSAGE = 1000
_LFS_POINTER = b"version https://git-lfs"

_BYTES_OF = {
    **dict.fromkeys(("F64", "I64", "U64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("BF16", "F16", "I16", "U16"), 2),
    **dict.fromkeys(("F8_E4M3", "F8_E5M2", "I8", "U8", "BOOL"), 1),
}
"""Bytes of an element, by dtype in a safetensors file. Dtypes of less than a byte, and unknown ones, are absent."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Location of one tensor: bytes ``start`` to ``end`` of ``file``."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    end: int


def checkpoint_files(folder: Path) -> list[Path]:
    """Lists the safetensors files of the checkpoint in ``folder``: ``model.safetensors``, or what the index lists.

    Raises:
        InvalidPair: there are none, the index is malformed, or a file that it lists is missing.
    """
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    for file in (single, index):
        check_link(file)
    if single.exists():
        return [single]
    if not index.exists():
        raise InvalidPair(f"{folder} has neither {single.name} nor {index.name}")
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InvalidPair(f"{index}: malformed index of a checkpoint's files: {error!r}") from None
    if not names:
        raise InvalidPair(f"{index} lists no files")
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise InvalidPair(f"{index}: {name!r} is not a file name in this folder")
        check_link(folder / name)
    missing = sorted(name for name in names if not (folder / name).exists())
    if missing:
        raise InvalidPair(f"{index} lists files that are not in the folder: {', '.join(missing)}")
    return [folder / name for name in sorted(names)]


def check_not_pointer(file: Path) -> None:
    """Raises InvalidPair if ``file`` is what Git LFS leaves in place of a large file that it has not downloaded."""
    with file.open("rb") as stream:
        if stream.read(len(_LFS_POINTER)) == _LFS_POINTER:
            raise InvalidPair(f"{file} is a Git LFS pointer, not weights; run `git lfs pull` in its folder")


def list_tensors(folder: Path) -> list[StoredTensor]:
    """Lists the tensors of the safetensors checkpoint in ``folder``, in name order. Reads headers only.

    Raises:
        InvalidPair: a file is missing or malformed, its size differs from what its header says, or a tensor's bytes do
            not fit its shape.
    """
    tensors: dict[str, StoredTensor] = {}
    for file in checkpoint_files(folder):
        for tensor in _read_header(file):
            if tensor.name in tensors:
                raise InvalidPair(f"{file}: tensor {tensor.name} is also in {tensors[tensor.name].file.name}")
            tensors[tensor.name] = tensor
    return [tensors[name] for name in sorted(tensors, key=str.encode)]


def checkpoint_digest(
    folder: Path, report: Report = silent, check: Callable[[StoredTensor, bytes], None] | None = None
) -> str:
    """Computes the digest of the checkpoint in ``folder``, as lower-case hex.

    Args:
        report: called with a description, the bytes done and the bytes in total.
        check: called with every part of every tensor as it is read, at most 1 MiB each; it may raise.

    Raises:
        InvalidPair: a file is missing, malformed or damaged.
    """
    tensors = list_tensors(folder)
    total, done = sum(t.end - t.start for t in tensors), 0
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(digest_head(tensor))
        with tensor.file.open("rb") as stream:
            stream.seek(tensor.start)
            remaining = tensor.end - tensor.start
            while remaining:
                data = stream.read(min(_READ_BYTES, remaining))
                if not data:
                    raise InvalidPair(f"{tensor.file}: ends inside tensor {tensor.name}")
                digest.update(data)
                if check is not None:
                    check(tensor, data)
                remaining -= len(data)
                done += len(data)
                report("Reading weights", done, total)
    return digest.hexdigest()


def digest_head(tensor: StoredTensor) -> bytes:
    """Returns what a tensor contributes to a digest before its data; see the module's docstring."""
    texts = b"".join(struct.pack("<Q", len(text)) + text for text in (tensor.name.encode(), tensor.dtype.encode()))
    return texts + struct.pack(f"<{len(tensor.shape) + 1}Q", len(tensor.shape), *tensor.shape)


def _read_header(file: Path) -> list[StoredTensor]:
    try:
        check_not_pointer(file)
        with file.open("rb") as stream:
            return read_header(file, stream, file.stat().st_size)
    except FileNotFoundError:
        raise InvalidPair(f"{file}: missing") from None


def read_header(
    file: Path, stream: BinaryIO, size: int, max_header_bytes: int = _MAX_HEADER_BYTES
) -> list[StoredTensor]:
    """Lists the tensors of a safetensors file, in the header's order, from ``stream``, which is at its start.

    Args:
        file: for messages and results.
        size: bytes of the file.

    Raises:
        InvalidPair: the header is malformed or too large, or does not describe ``size`` bytes.
    """
    try:
        (length,) = struct.unpack("<Q", stream.read(8))
        if length > min(max_header_bytes, size - 8):
            raise InvalidPair(f"{file}: truncated or not a safetensors file (header of {length} bytes)")
        header: dict[str, Any] = json.loads(stream.read(length), object_pairs_hook=_without_duplicates)
        header.pop("__metadata__", None)
        base = 8 + length
        tensors = [_stored(name, tensor, file, base) for name, tensor in header.items()]
        expected = max((t.end for t in tensors), default=base)
        misfits = [
            t for t in tensors if t.dtype in _BYTES_OF and t.end - t.start != math.prod(t.shape) * _BYTES_OF[t.dtype]
        ]
    except (struct.error, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        # Not repr(error): that of an error of decoding has the whole header.
        raise InvalidPair(f"{file}: not a safetensors file: {type(error).__name__}: {error}"[:_MAX_MESSAGE]) from None
    if expected != size:
        raise InvalidPair(f"{file}: {size} bytes, but its header describes {expected}; the file is damaged")
    if misfits:
        wrong = misfits[0]
        raise InvalidPair(
            f"{file}: tensor {wrong.name[:200]} has {wrong.end - wrong.start} bytes, which do not fit {wrong.dtype} of "
            f"shape {str(wrong.shape)[:80]}; the file is damaged"
        )
    return tensors


def _stored(name: str, tensor: Mapping[str, Any], file: Path, base: int) -> StoredTensor:
    """Returns the tensor that a header's entry describes; raises ValueError if it cannot describe one."""
    dtype, shape, (begin, end) = tensor["dtype"], tensor["shape"], tensor["data_offsets"]
    # The product of a shape of 500,000 dimensions would take 20 s, in which no other thread runs.
    if not isinstance(shape, list) or len(shape) > _MAX_DIMENSIONS:
        raise ValueError(f"the shape of {name[:200]} is not a list of at most {_MAX_DIMENSIONS} dimensions")
    if not isinstance(dtype, str) or not all(type(n) is int and 0 <= n < 1 << 63 for n in (*shape, begin, end)):
        raise ValueError(f"dtype, shape or data_offsets of {name[:200]} are not text and whole numbers")
    return StoredTensor(name, dtype, tuple(shape), file, base + begin, base + end)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        raise ValueError("the header names a tensor twice")
    return content

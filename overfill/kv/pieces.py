"""Boxes of a sequence with their cells outside of a cache: what chunks are read into and written from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import xxhash

from overfill.kv.ranges import KvRange
from overfill.kv.wire import Buffer


@dataclass(slots=True)
class Piece:
    """A box, and the bytes that belong there.

    Attributes:
        payload: keys then values, each [layers, tokens, heads, head_dim].
        scales: of a payload of int8 codes, keys' then values', each [layers, tokens, heads] float32; empty: it is none.
        header: what the checksum covers before the payload; empty: there is no checksum.
        checksum: XXH3-64 of header, scales and payload.
    """

    box: KvRange
    payload: Buffer
    header: bytes = b""
    checksum: int = 0
    scales: Buffer = b""


def digest(*parts: Buffer) -> int:
    """XXH3-64 of the parts, one after another."""
    whole = xxhash.xxh3_64()
    for part in parts:
        whole.update(part)
    return whole.intdigest()


def is_damaged(piece: Piece) -> bool:
    """Whether it has a checksum, and that is not its own."""
    return bool(piece.header) and digest(piece.header, piece.scales, piece.payload) != piece.checksum


def first_damaged(pieces: Sequence[Piece]) -> int:
    """Index of the first piece whose checksum is not its own; their number when there is none."""
    return next((index for index, piece in enumerate(pieces) if is_damaged(piece)), len(pieces))

"""Ranges of a prompt's KV, and the record of which of them have moved. No tensors."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from overfill.errors import TransferFailed
from overfill.v1 import kv_pb2


class KvRange(NamedTuple):
    """Full-model layers x prompt positions x KV heads, each half-open, in the order of the wire.

    Its size is counted in vectors: each layer, position and head has a key vector and a value vector.
    """

    layer_start: int
    layer_end: int
    token_start: int
    token_end: int
    head_start: int
    head_end: int

    @property
    def num_layers(self) -> int:
        return self.layer_end - self.layer_start

    @property
    def num_tokens(self) -> int:
        return self.token_end - self.token_start

    @property
    def num_heads(self) -> int:
        return self.head_end - self.head_start

    @property
    def num_vectors(self) -> int:
        """Number of key and value vectors, of ``head_dim`` elements each."""
        return 2 * self.num_layers * self.num_tokens * self.num_heads

    @property
    def layers(self) -> range:
        return range(self.layer_start, self.layer_end)

    @property
    def tokens(self) -> tuple[int, int]:
        return self.token_start, self.token_end

    @property
    def heads(self) -> tuple[int, int]:
        return self.head_start, self.head_end

    def overlaps(self, other: KvRange) -> bool:
        """Whether a vector is in both ranges; neither is empty."""
        return (
            self.layer_start < other.layer_end
            and other.layer_start < self.layer_end
            and self.token_start < other.token_end
            and other.token_start < self.token_end
            and self.head_start < other.head_end
            and other.head_start < self.head_end
        )

    def to_proto(self) -> kv_pb2.KvRange:
        return kv_pb2.KvRange(**self._asdict())

    @classmethod
    def from_proto(cls, message: kv_pb2.KvRange) -> KvRange:
        return cls(*(getattr(message, name) for name in cls._fields))

    def __str__(self) -> str:
        return (
            f"layers {self.layer_start}:{self.layer_end} x tokens {self.token_start}:{self.token_end} "
            f"x heads {self.head_start}:{self.head_end}"
        )


def runs(numbers: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Yields the maximal runs of consecutive numbers in ascending ``numbers``, as half-open ranges."""
    start = previous = None
    for number in numbers:
        if start is None or previous is None:
            start = number
        elif number != previous + 1:
            yield start, previous + 1
            start = number
        previous = number
    if start is not None and previous is not None:
        yield start, previous + 1


def share_among_streams(
    layers: Sequence[int], tokens: tuple[int, int], heads: tuple[int, int], streams: int
) -> list[list[KvRange]]:
    """Divides the KV of ``heads``, a half-open range, among ``streams``, which take small groups of layers in turn.

    Layers are computed in order, so that all streams have work at any time. Neighbours in a group, or in the only
    stream, can share a chunk if the prompt is short.

    Returns:
        The ranges of each stream. With fewer layers than streams, there are fewer lists than ``streams``.
    """
    size = max(1, len(layers) // (4 * streams)) if streams > 1 else len(layers)
    groups = [layers[i : i + size] for i in range(0, len(layers), size)]
    shares = [groups[i::streams] for i in range(min(streams, len(groups)))]
    return [[KvRange(a, b, *tokens, *heads) for group in share for a, b in runs(group)] for share in shares]


_MAX_COMPARED = 64
"""Maximum number of ranges that a request's check compares with each other, in 0.2 ms. A request has fewer at first.
More go through a bitmap, whose time grows with the prompt: 10 ms for 128 k tokens."""


class Coverage:
    """Bitmap of the layers, positions and heads of a transfer that have moved. Thread-safe.

    Args:
        layers: full-model layers that travel, ascending.
        tokens: half-open range of prompt positions that travel.
        heads: half-open range of KV heads of the full model that travel.
    """

    def __init__(self, layers: Sequence[int], tokens: tuple[int, int], heads: tuple[int, int]) -> None:
        self._row = {layer: i for i, layer in enumerate(layers)}
        self._tokens = tokens
        self._heads = heads
        self._done = np.zeros((len(layers), tokens[1] - tokens[0], heads[1] - heads[0]), dtype=bool)
        self._missing = self._done.size
        self._lock = threading.Lock()

    @property
    def missing_vectors(self) -> int:
        """Number of key and value vectors that have not moved."""
        return 2 * self._missing

    @property
    def complete(self) -> bool:
        return self._missing == 0

    def check_inside(self, kv_range: KvRange) -> None:
        """Raises TransferFailed if ``kv_range`` is empty or reaches outside the transfer."""
        inside = (
            all(layer in self._row for layer in range(kv_range.layer_start, kv_range.layer_end))
            and self._tokens[0] <= kv_range.token_start < kv_range.token_end <= self._tokens[1]
            and self._heads[0] <= kv_range.head_start < kv_range.head_end <= self._heads[1]
            and kv_range.layer_start < kv_range.layer_end
        )
        if not inside:
            raise TransferFailed(f"range {kv_range} lies outside the transfer or is empty")

    def check_request(self, ranges: Sequence[KvRange]) -> None:
        """Raises TransferFailed if a range lies outside the transfer or overlaps another one. Marks nothing."""
        if len(ranges) > _MAX_COMPARED:
            request = Coverage(list(self._row), self._tokens, self._heads)
            for kv_range in ranges:
                request.add(kv_range)
            return
        for index, kv_range in enumerate(ranges):
            self.check_inside(kv_range)
            if any(map(kv_range.overlaps, ranges[:index])):
                raise TransferFailed(f"range {kv_range} overlaps another one of the request")

    def missing(self, ranges: Sequence[KvRange]) -> list[KvRange]:
        """The unmarked parts of ``ranges`` as ranges that do not overlap. ``ranges`` lie inside the transfer."""
        found: list[KvRange] = []
        for kv_range in ranges:
            with self._lock:
                if self._marks(kv_range).all():  # the usual case; the search layer by layer takes milliseconds
                    continue
            for layer in kv_range.layers:
                one = kv_range._replace(layer_start=layer, layer_end=layer + 1)
                with self._lock:
                    lacks = ~self._marks(one)[0]
                _extend(found, one, lacks)
        return found

    def add(self, kv_range: KvRange) -> None:
        """Marks ``kv_range``.

        Raises:
            TransferFailed: it lies outside the transfer or overlaps a marked range; nothing is marked.
        """
        self.check_inside(kv_range)
        view = self._marks(kv_range)
        with self._lock:
            if view.any():
                raise TransferFailed(f"range {kv_range} overlaps one that arrived before")
            view[...] = True
            self._missing -= view.size

    def remove(self, kv_range: KvRange) -> None:
        """Unmarks ``kv_range``, which ``add`` marked."""
        with self._lock:
            view = self._marks(kv_range)
            view[...] = False
            self._missing += view.size

    def _marks(self, kv_range: KvRange) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """View of the bitmap of ``kv_range``, which lies inside the transfer. [layers, tokens, heads]"""
        row, token, head = self._row[kv_range.layer_start], self._tokens[0], self._heads[0]
        return self._done[
            row : row + kv_range.num_layers,
            kv_range.token_start - token : kv_range.token_end - token,
            kv_range.head_start - head : kv_range.head_end - head,
        ]


class ReplicaCounts:
    """Finds the ranges that all of several ranks hold, which receive the same KV. Arguments as of ``Coverage``.

    Each rank adds each vector once.
    """

    def __init__(self, layers: Sequence[int], tokens: tuple[int, int], heads: tuple[int, int], replicas: int) -> None:
        self._row = {layer: i for i, layer in enumerate(layers)}
        self._offsets = tokens[0], heads[0]
        self._replicas = replicas
        shape = (len(layers), tokens[1] - tokens[0], heads[1] - heads[0]) if replicas > 1 else 0
        self._counts = np.zeros(shape, dtype=np.uint16)

    def add(self, ranges: Sequence[KvRange]) -> Sequence[KvRange]:
        """Counts ``ranges``, which one more rank holds. Returns the parts that all ranks hold now."""
        if self._replicas == 1:
            return ranges
        found: list[KvRange] = []
        token, head = self._offsets
        for kv_range in ranges:
            for layer in kv_range.layers:
                counts = self._counts[
                    self._row[layer],
                    kv_range.token_start - token : kv_range.token_end - token,
                    kv_range.head_start - head : kv_range.head_end - head,
                ]
                counts += 1
                _extend(found, kv_range._replace(layer_start=layer, layer_end=layer + 1), counts == self._replicas)
        return found


def _extend(found: list[KvRange], layer: KvRange, chosen: np.ndarray[Any, np.dtype[np.bool_]]) -> None:
    """Appends the ``chosen`` parts of ``layer``, a range of one layer, to ``found``. ``chosen``: [tokens, heads].

    Joins the last range of ``found``, if it ends below this layer, with an equal one.
    """
    together = np.array_equal(chosen.any(axis=1), chosen.all(axis=1))
    heads = [(0, layer.num_heads)] if together else [(i, i + 1) for i in range(layer.num_heads)]
    for first, last in heads:
        positions = (np.flatnonzero(chosen[:, first]) + layer.token_start).tolist()
        for start, end in runs(positions):
            one = KvRange(*layer[:2], start, end, layer.head_start + first, layer.head_start + last)
            above = found[-1] if found and found[-1].layer_end == layer.layer_start else None
            if above and (above.tokens, above.heads) == (one.tokens, one.heads):
                found[-1] = above._replace(layer_end=layer.layer_end)
            else:
                found.append(one)

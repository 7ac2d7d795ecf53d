"""Boxes of a KV cache and the record of which of them have been moved. No tensors."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from overfill.errors import TransferFailed
from overfill.v1 import kv_pb2


@dataclass(frozen=True, slots=True)
class KvRange:
    """Full-model layers x prompt positions x KV heads, each half-open."""

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
    def cells(self) -> int:
        """Layer x token x head cells; each holds one key and one value of head_dim elements."""
        return self.num_layers * self.num_tokens * self.num_heads

    @property
    def layers(self) -> range:
        return range(self.layer_start, self.layer_end)

    @property
    def tokens(self) -> tuple[int, int]:
        return self.token_start, self.token_end

    @property
    def heads(self) -> tuple[int, int]:
        return self.head_start, self.head_end

    def as_tuple(self) -> tuple[int, ...]:
        """The six numbers in wire order."""
        return (
            self.layer_start, self.layer_end, self.token_start, self.token_end, self.head_start, self.head_end,
        )  # fmt: skip

    def to_proto(self) -> kv_pb2.KvRange:
        return kv_pb2.KvRange(
            layer_start=self.layer_start,
            layer_end=self.layer_end,
            token_start=self.token_start,
            token_end=self.token_end,
            head_start=self.head_start,
            head_end=self.head_end,
        )

    @classmethod
    def from_proto(cls, message: kv_pb2.KvRange) -> KvRange:
        return cls(
            message.layer_start,
            message.layer_end,
            message.token_start,
            message.token_end,
            message.head_start,
            message.head_end,
        )

    def __str__(self) -> str:
        return (
            f"layers {self.layer_start}:{self.layer_end} x tokens {self.token_start}:{self.token_end} "
            f"x heads {self.head_start}:{self.head_end}"
        )


def runs(numbers: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Maximal runs of consecutive numbers in ascending ``numbers``, half-open."""
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


def share_out(layers: Sequence[int], tokens: tuple[int, int], num_heads: int, streams: int) -> list[list[KvRange]]:
    """Divides a transfer among ``streams``: small groups of layers in turn, so that all have work as layers appear.

    Returns one list of ranges per stream; fewer lists when there are fewer layers than streams.
    """
    # Neighbours in a group can share a chunk when the prompt is short.
    size = max(1, len(layers) // (4 * streams))
    groups = [layers[i : i + size] for i in range(0, len(layers), size)]
    shares = [groups[i::streams] for i in range(min(streams, len(groups)))]
    return [[KvRange(a, b, *tokens, 0, num_heads) for group in share for a, b in runs(group)] for share in shares]


class Coverage:
    """Which cells of a transfer have been moved: a bitmap over layers x tokens x heads. Thread-safe.

    Args:
        layers: full-model layers that travel, ascending.
        tokens: half-open range of prompt positions.
        num_heads: KV heads of the full model.
    """

    def __init__(self, layers: Sequence[int], tokens: tuple[int, int], num_heads: int) -> None:
        self._row = {layer: i for i, layer in enumerate(layers)}
        self._tokens = tokens
        self._num_heads = num_heads
        self._done = np.zeros((len(layers), tokens[1] - tokens[0], num_heads), dtype=bool)
        self._missing = self._done.size
        self._lock = threading.Lock()

    @property
    def missing_cells(self) -> int:
        return self._missing

    @property
    def complete(self) -> bool:
        return self._missing == 0

    def check_inside(self, box: KvRange) -> None:
        """Raises TransferFailed when ``box`` is empty or reaches outside the transfer."""
        inside = (
            all(layer in self._row for layer in range(box.layer_start, box.layer_end))
            and self._tokens[0] <= box.token_start < box.token_end <= self._tokens[1]
            and 0 <= box.head_start < box.head_end <= self._num_heads
            and box.layer_start < box.layer_end
        )
        if not inside:
            raise TransferFailed(f"range {box} lies outside the transfer or is empty")

    def missing(self, ranges: Sequence[KvRange]) -> list[KvRange]:
        """What of ``ranges``, which lie inside, has not been marked, in boxes that overlap nothing that has."""
        boxes: list[KvRange] = []
        for box in ranges:
            with self._lock:
                if self._cells(box).all():  # as nearly always: looking layer by layer takes milliseconds
                    continue
            tokens = slice(box.token_start - self._tokens[0], box.token_end - self._tokens[0])
            for layer in range(box.layer_start, box.layer_end):
                with self._lock:
                    lacks = ~self._done[self._row[layer], tokens, box.head_start : box.head_end]
                together = np.array_equal(lacks.any(axis=1), lacks.all(axis=1))
                heads = [(0, box.num_heads)] if together else [(i, i + 1) for i in range(box.num_heads)]
                for first, last in heads:
                    positions = (np.flatnonzero(lacks[:, first]) + box.token_start).tolist()
                    for start, end in runs(positions):
                        piece = KvRange(layer, layer + 1, start, end, box.head_start + first, box.head_start + last)
                        above = boxes[-1] if boxes and boxes[-1].layer_end == layer else None
                        if above and replace(above, layer_start=layer, layer_end=layer + 1) == piece:
                            boxes[-1] = replace(above, layer_end=layer + 1)
                        else:
                            boxes.append(piece)
        return boxes

    def add(self, box: KvRange) -> None:
        """Marks ``box``; raises TransferFailed, changing nothing, when it lies outside or overlaps what is marked."""
        self.check_inside(box)
        view = self._cells(box)
        with self._lock:
            if view.any():
                raise TransferFailed(f"range {box} overlaps one that arrived before")
            view[...] = True
            self._missing -= view.size

    def remove(self, box: KvRange) -> None:
        """Takes back ``add``."""
        with self._lock:
            self._cells(box)[...] = False
            self._missing += box.cells

    def _cells(self, box: KvRange) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """The marks of ``box``, which lies inside, as a view: [layers, tokens, heads]."""
        first = self._row[box.layer_start]
        offset = self._tokens[0]
        return self._done[
            first : first + box.num_layers,
            box.token_start - offset : box.token_end - offset,
            box.head_start : box.head_end,
        ]

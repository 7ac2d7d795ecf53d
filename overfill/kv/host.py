"""A KV cache in host memory, read and written as bytes: one copy, at the speed of memory, beside everything else.

Whole blocks are copied as rows of several KiB, the rest token by token. numpy lets other threads run meanwhile.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import torch

from overfill.kv.wire import Buffer

Bytes: TypeAlias = "np.ndarray[Any, np.dtype[np.uint8]]"


class HostCells:
    """Keys and values [layers, blocks, block_size, heads, head_dim] on the CPU, seen as bytes."""

    def __init__(self, k: torch.Tensor, v: torch.Tensor) -> None:
        layers, blocks, self._block_size, self._num_heads, _ = k.shape
        self._cell = k.shape[-1] * k.element_size()  # bytes of one head of one token
        flat = [half.view(torch.uint8).numpy().reshape(layers, -1) for half in (k, v)]
        self._blocks = [half.reshape(layers, blocks, -1) for half in flat]
        self._tokens = [half.reshape(layers, blocks * self._block_size, -1) for half in flat]

    def read(
        self,
        block_table: Sequence[int],
        layers: Sequence[int],
        tokens: tuple[int, int],
        heads: tuple[int, int],
        out: memoryview | None,
    ) -> memoryview:
        """As ``KvCache.read``."""
        count = tokens[1] - tokens[0]
        width = (heads[1] - heads[0]) * self._cell
        data: Bytes
        if out is None:
            data = np.empty(2 * len(layers) * count * width, dtype=np.uint8)
        else:
            data = np.frombuffer(out, dtype=np.uint8)
        view = data.reshape(2, len(layers), count, width)
        whole, table, slots = self._split(block_table, tokens)
        columns = slice(heads[0] * self._cell, heads[1] * self._cell)
        for half in (0, 1):
            for i, layer in enumerate(layers):
                target = view[half, i]
                if width < self._num_heads * self._cell:
                    target[:] = self._tokens[half][layer][slots, columns]
                    continue
                if whole:
                    rows = target[:whole].reshape(len(table), -1)
                    # Mode "clip" copies straight into ``out``; every id is in range.
                    np.take(self._blocks[half][layer], table, axis=0, out=rows, mode="clip")
                if whole < count:
                    np.take(self._tokens[half][layer], slots[whole:], axis=0, out=target[whole:], mode="clip")
        return data.data if out is None else out

    def write(
        self,
        block_table: Sequence[int],
        rows: Sequence[Sequence[int]],
        tokens: tuple[int, int],
        heads: tuple[int, int],
        payload: Buffer,
    ) -> None:
        """As ``KvCache.write``."""
        count = tokens[1] - tokens[0]
        width = (heads[1] - heads[0]) * self._cell
        view = np.frombuffer(payload, dtype=np.uint8).reshape(2, len(rows), count, width)
        whole, table, slots = self._split(block_table, tokens)
        columns = slice(heads[0] * self._cell, heads[1] * self._cell)
        for half in (0, 1):
            for i, targets in enumerate(rows):
                source = view[half, i]
                for row in targets:
                    if width < self._num_heads * self._cell:
                        self._tokens[half][row][slots, columns] = source
                        continue
                    if whole:
                        self._blocks[half][row][table] = source[:whole].reshape(len(table), -1)
                    if whole < count:
                        self._tokens[half][row][slots[whole:]] = source[whole:]

    def _split(
        self, block_table: Sequence[int], tokens: tuple[int, int]
    ) -> tuple[int, np.ndarray[Any, np.dtype[np.int64]], np.ndarray[Any, np.dtype[np.int64]]]:
        """How many tokens, from the first, fill whole blocks; those blocks; the slots of all tokens."""
        size = self._block_size
        table = np.asarray(block_table, dtype=np.int64)
        positions = np.arange(*tokens, dtype=np.int64)
        slots = table[positions // size] * size + positions % size
        if tokens[0] % size:
            return 0, table[:0], slots
        first, last = tokens[0] // size, tokens[1] // size
        return (last - first) * size, table[first:last], slots

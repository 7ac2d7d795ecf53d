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
        partial = width < self._num_heads * self._cell
        whole, table, slots = self._split(block_table, tokens, partial)
        columns = slice(heads[0] * self._cell, heads[1] * self._cell)
        for half in (0, 1):
            for i, layer in enumerate(layers):
                target = view[half, i]
                if partial:
                    target[:] = self._tokens[half][layer][slots, columns]
                    continue
                if whole:
                    rows = target[:whole].reshape(len(table), -1)
                    # Mode "clip" copies straight into ``out``; every id is in range.
                    np.take(self._blocks[half][layer], table, axis=0, out=rows, mode="clip")
                if whole < count:
                    np.take(self._tokens[half][layer], slots, axis=0, out=target[whole:], mode="clip")
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
        partial = width < self._num_heads * self._cell
        whole, table, slots = self._split(block_table, tokens, partial)
        columns = slice(heads[0] * self._cell, heads[1] * self._cell)
        for half in (0, 1):
            for i, targets in enumerate(rows):
                source = view[half, i]
                for row in targets:
                    if partial:
                        self._tokens[half][row][slots, columns] = source
                        continue
                    if whole:
                        self._blocks[half][row][table] = source[:whole].reshape(len(table), -1)
                    if whole < count:
                        self._tokens[half][row][slots] = source[whole:]

    def _split(
        self, block_table: Sequence[int], tokens: tuple[int, int], partial: bool
    ) -> tuple[int, np.ndarray[Any, np.dtype[np.int64]], np.ndarray[Any, np.dtype[np.int64]]]:
        """How many tokens, from the first, fill whole blocks; those blocks; the slots of the tokens after them.

        ``partial``: some heads are left out, so that no block is whole.
        """
        size = self._block_size
        first, last = tokens[0] // size, tokens[1] // size
        if partial or tokens[0] % size:
            last = first
        whole = max(0, last - first) * size
        begin = tokens[0] + whole
        blocks = np.asarray(block_table[first : -(-tokens[1] // size)], dtype=np.int64)
        positions = np.arange(begin, tokens[1], dtype=np.int64)
        slots = blocks[positions // size - first] * size + positions % size
        return whole, blocks[: whole // size], slots

"""A pair of paged tensors, keys' and values', read and written as bytes: what a cache is made of, and what travels.

Where the memory is the host's, with native code or numpy; on a device, beside its steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch

from overfill.kv.host import HostCells
from overfill.kv.native import library
from overfill.kv.native.library import NativeCells, Rows
from overfill.kv.pieces import Piece, digest, first_damaged
from overfill.kv.wire import Buffer

# A mark in a device's work; None on the CPU, where work is done when the call returns.
DeviceEvent = torch.cuda.Event


def mark(device: torch.device) -> DeviceEvent | None:
    """A mark after all that this thread has launched on ``device`` so far; None where nothing is left running.

    An event without a stream would be recorded on the thread's current device, which may be another one.
    """
    if device.type != "cuda":
        return None
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(device))
    return event


def slots_of(block_table: Sequence[int], start: int, end: int, block_size: int, device: torch.device) -> torch.Tensor:
    """Slots of tokens ``start..end`` of a sequence. [end - start], int64, on ``device``."""
    table = torch.tensor(block_table, dtype=torch.int64)
    positions = torch.arange(start, end, dtype=torch.int64)
    return (table[positions // block_size] * block_size + positions % block_size).to(device)


class Cells:
    """What a cache holds for each key and each value vector: its elements, their codes, or a scale.

    ``read`` and ``write`` may be called from any thread, beside a running step: they use a stream of their own.

    Args:
        k, v: [num_layers, num_blocks, block_size, num_kv_heads, width], of one type and device.
    """

    def __init__(self, k: torch.Tensor, v: torch.Tensor) -> None:
        self._k, self._v = k, v
        self._block_size = k.shape[2]
        on_cuda, on_cpu = k.device.type == "cuda", k.device.type == "cpu"
        self._io_stream = torch.cuda.Stream(k.device) if on_cuda else None
        self._host = HostCells(k, v) if on_cpu else None
        native = library.load() if on_cpu else None
        self._native = NativeCells(native, k, v) if native is not None else None

    def layer(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Both tensors' views of one layer, each [num_slots, num_kv_heads, width]."""
        return self._k[index].flatten(0, 1), self._v[index].flatten(0, 1)

    def read(
        self,
        block_table: Sequence[int],
        layers: Sequence[int],
        tokens: tuple[int, int],
        heads: tuple[int, int],
        after: DeviceEvent | None = None,
        out: memoryview | None = None,
    ) -> memoryview:
        """Keys then values of one sequence, each [layers, tokens, heads, width], as bytes; ranges are half-open.

        Args:
            after: marks the moment from which the cells hold what is wanted.
            out: where to put them, when it has the right length; None takes fresh memory.
        """
        if self._host is not None:
            return self._host.read(block_table, layers, tokens, heads, out)
        with self._io():
            if self._io_stream is not None and after is not None:
                self._io_stream.wait_event(after)
            slots = self._slots(block_table, tokens)
            shape = (2, len(layers), slots.numel(), heads[1] - heads[0], self._k.shape[-1])
            gathered = torch.empty(shape, dtype=self._k.dtype, device=self._k.device)
            for i, layer in enumerate(layers):
                for half, flat in enumerate(self.layer(layer)):
                    torch.index_select(flat[:, heads[0] : heads[1]], 0, slots, out=gathered[half, i])
            # Through a byte view, since numpy knows no bfloat16.
            data = gathered.view(torch.uint8).cpu().numpy().reshape(-1).data
        if out is None:
            return data
        out[:] = data
        return out

    def write(
        self,
        block_table: Sequence[int],
        rows: Sequence[Sequence[int]],
        tokens: tuple[int, int],
        heads: tuple[int, int],
        payload: Buffer,
    ) -> None:
        """Writes keys then values, each [len(rows), tokens, heads, width], as ``read`` gave them.

        Args:
            rows: for each layer of the payload, the layers of this cache that take it.
            heads: half-open range of KV heads that the payload covers.
        """
        if self._host is not None:
            self._host.write(block_table, rows, tokens, heads, payload)
            return
        with self._io():
            slots = self._slots(block_table, tokens)
            shape = (2, len(rows), slots.numel(), heads[1] - heads[0], self._k.shape[-1])
            # A copy: torch refuses to look at a read-only buffer without a warning.
            data = torch.frombuffer(bytearray(payload), dtype=self._k.dtype).view(shape).to(self._k.device)
            for i, targets in enumerate(rows):
                for row in targets:
                    for half, flat in enumerate(self.layer(row)):
                        flat[:, heads[0] : heads[1]].index_copy_(0, slots, data[half, i])
        if self._io_stream is not None:
            self._io_stream.synchronize()

    def read_pieces(
        self, block_table: Sequence[int], pieces: Sequence[Piece], after: Mapping[int, DeviceEvent | None]
    ) -> None:
        """Fills the payloads of ``pieces``, which are writable, and the checksums of those that have a header.

        Args:
            after: per layer, as in ``read``; layers are computed in order.
        """
        if self._native is not None:
            self._native.read(block_table, pieces)
            return
        for piece in pieces:
            box, out = piece.box, memoryview(piece.payload)
            self.read(block_table, box.layers, box.tokens, box.heads, after.get(box.layers[-1]), out)
            if piece.header:
                piece.checksum = digest(piece.header, piece.payload)

    def write_pieces(self, block_table: Sequence[int], rows: Rows, pieces: Sequence[Piece]) -> int:
        """Writes pieces of a full model's KV, and checks those that have a header.

        Args:
            rows: where its layers go.

        Returns:
            How many of them, from the first, are in place. When that is not all, the next one is damaged, and what its
            box holds is void.
        """
        if self._native is not None:
            return self._native.write(block_table, rows, pieces)
        whole = first_damaged(pieces)
        for piece in pieces[:whole]:
            box = piece.box
            self.write(block_table, [rows[layer] for layer in box.layers], box.tokens, box.heads, piece.payload)
        return whole

    def _slots(self, block_table: Sequence[int], tokens: tuple[int, int]) -> torch.Tensor:
        return slots_of(block_table, *tokens, self._block_size, self._k.device)

    def _io(self) -> AbstractContextManager[object]:
        return nullcontext() if self._io_stream is None else torch.cuda.stream(self._io_stream)

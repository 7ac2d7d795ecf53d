"""The sending half of a handoff: hands out each piece of a prompt's KV as soon as it is computed.

Knows the cache and the progress of the prefill; knows nothing of RPCs. Everything but ``_read`` runs on
the event loop.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncGenerator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Protocol

from overfill.kv.cache import KvCache
from overfill.kv.cells import DeviceEvent
from overfill.kv.chunks import TransferSpec, blank_piece, lay_out_raw, seal, seal_in_place
from overfill.kv.codecs import encode
from overfill.kv.pieces import Piece
from overfill.kv.ranges import Coverage, KvRange
from overfill.kv.shielded import shielded
from overfill.kv.wire import Frame, join
from overfill.rpc.constants import MAX_CHUNK_PAYLOAD, MAX_SHARED_PAYLOAD
from overfill.v1 import common_pb2

_MAX_CHUNKS = 4
"""Most chunks in one message, whose cost hardly depends on what is in it."""
_QUICK = 0.25
"""Seconds in which a stream takes a message, so that the next ones may be larger."""
_local = threading.local()


class MessageGrowth:
    """Most chunks in a stream's next message: twice as many after each quick one, and one again after a slow one.

    Both ends count progress in whole messages. A slow stream therefore sends messages of one chunk.
    """

    def __init__(self) -> None:
        self._most = 1

    def take(self) -> int:
        """Most chunks of the message that is made now."""
        return self._most

    def sent(self, seconds: float) -> None:
        """The stream took ``seconds`` for a message."""
        self._most = 1 if seconds > _QUICK else min(_MAX_CHUNKS, 2 * self._most)


@dataclass(frozen=True, slots=True)
class Slot:
    """Room for one payload in shared memory."""

    number: int
    memory: memoryview


class Slots(Protocol):
    """Where payloads go that do not travel; whoever reads them says when a slot is free again."""

    @property
    def free(self) -> bool: ...

    async def acquire(self) -> Slot: ...


class KvSender:
    """One prompt's KV on its way out.

    ``begin`` is called once, then ``written`` as layers are computed; ``chunks`` serves one data stream;
    ``acknowledge`` records what has arrived. Blocks must stay put until every ``chunks`` iterator has been closed.

    Attributes:
        ready_bytes: KV bytes computed so far, of the layers that travel.
    """

    def __init__(self, spec: TransferSpec, cache: KvCache, executor: Executor) -> None:
        self.spec = spec
        self._cache = cache
        self._block_table: Sequence[int] = ()
        self._executor = executor
        self._acknowledged = Coverage(spec.layers, spec.tokens, spec.kv.num_kv_heads)
        # Per full-model layer: positions below this are in the cache.
        self._ready = dict.fromkeys(spec.layers, spec.tokens[0])
        self._event: dict[int, DeviceEvent | None] = {}
        self._progress = asyncio.Event()  # a fresh one for each wait
        self._layer_bytes = spec.kv.token_layer_bytes
        self._raw = spec.codec == common_pb2.KV_CODEC_RAW
        self.ready_bytes = 0
        self.first_sent_ns: int | None = None
        self.last_sent_ns: int | None = None

    @property
    def acknowledged_bytes(self) -> int:
        return self.spec.total_bytes - self._acknowledged.missing_cells * self._layer_bytes // self.spec.kv.num_kv_heads

    @property
    def complete(self) -> bool:
        """Whether every range has been acknowledged."""
        return self._acknowledged.complete

    def begin(self, block_table: Sequence[int], cached_tokens: int, event: DeviceEvent | None) -> None:
        """The prompt's blocks; all layers of its first ``cached_tokens`` are in them once ``event`` has passed."""
        self._block_table = block_table
        if cached_tokens:
            for layer in self.spec.layers:
                self.written(layer, cached_tokens, event)

    def written(self, layer: int, token_end: int, event: DeviceEvent | None) -> None:
        """Positions below ``token_end`` of ``layer`` are in the cache once ``event`` has passed."""
        if layer not in self._ready:  # the decoder does not read this layer
            return
        token_end = max(token_end, self._ready[layer])
        self.ready_bytes += (token_end - self._ready[layer]) * self._layer_bytes
        self._ready[layer] = token_end
        self._event[layer] = event
        self._progress.set()
        self._progress = asyncio.Event()

    def acknowledge(self, box: KvRange) -> None:
        """Raises TransferFailed when ``box`` is not part of the transfer or was acknowledged before."""
        self._acknowledged.add(box)

    def check_ranges(self, ranges: Sequence[KvRange]) -> None:
        """Raises TransferFailed when a range lies outside the transfer or overlaps another one."""
        asked = Coverage(self.spec.layers, self.spec.tokens, self.spec.kv.num_kv_heads)
        for box in ranges:
            asked.add(box)

    async def chunks(self, ranges: Sequence[KvRange], slots: Slots | None = None) -> AsyncGenerator[bytes, None]:
        """Messages of encoded chunks that cover ``ranges``, each as soon as it is computed.

        Chunks that are ready together share a message. While one is being sent, the next is read. ``ranges`` have
        passed ``check_ranges``.

        Args:
            slots: shared memory that takes the payloads, of ``MAX_SHARED_PAYLOAD`` bytes at most; None leaves payloads
                in the chunks, of ``MAX_CHUNK_PAYLOAD`` at most.
        """
        sent = [dict.fromkeys(range(box.layer_start, box.layer_end), box.token_start) for box in ranges]
        reading: asyncio.Future[bytes] | None = None
        growth = MessageGrowth()
        try:
            while reading is not None or any(sent):
                if reading is None:
                    reading = await self._begin(ranges, sent, slots, growth.take())
                    continue
                message = await shielded(reading)
                reading = None
                if self._next_piece(ranges, sent, 1) is not None and (slots is None or slots.free):
                    reading = await self._begin(ranges, sent, slots, growth.take())
                began = time.monotonic_ns()
                if self.first_sent_ns is None:
                    self.first_sent_ns = began
                yield message
                self.last_sent_ns = time.monotonic_ns()
                growth.sent((self.last_sent_ns - began) / 1e9)
        finally:
            if reading is not None:
                await shielded(reading)

    async def _begin(
        self, ranges: Sequence[KvRange], sent: Sequence[dict[int, int]], slots: Slots | None, most: int
    ) -> asyncio.Future[bytes]:
        """Starts to read up to ``most`` pieces as the stream's next message, once there is one and room for it.

        Messages grow from one piece on, and shrink with what is left: nothing else moves while the first one is read
        and the last one written.
        """
        largest = MAX_CHUNK_PAYLOAD if slots is None else MAX_SHARED_PAYLOAD
        while self._next_piece(ranges, sent, largest) is None:
            await self._progress.wait()
        pieces: list[tuple[KvRange, Slot | None]] = []
        most = min(most, max(1, self._left(ranges, sent) // (2 * largest)))
        while len(pieces) < most and (not pieces or slots is None or slots.free):
            piece = self._next_piece(ranges, sent, largest)
            if piece is None:
                break
            slot = await slots.acquire() if slots is not None else None
            index, box = piece
            for layer in range(box.layer_start, box.layer_end):
                if box.token_end == ranges[index].token_end:
                    del sent[index][layer]
                else:
                    sent[index][layer] = box.token_end
            pieces.append((box, slot))
        return asyncio.get_running_loop().run_in_executor(self._executor, self._read_all, pieces)

    def _left(self, ranges: Sequence[KvRange], sent: Sequence[dict[int, int]]) -> int:
        """Bytes of ``ranges`` that are not sent."""
        cells = sum(
            box.num_heads * (box.token_end - start)
            for box, cursors in zip(ranges, sent, strict=True)
            for start in cursors.values()
        )
        return cells * self._layer_bytes // self.spec.kv.num_kv_heads

    def _next_piece(
        self, ranges: Sequence[KvRange], sent: Sequence[dict[int, int]], largest: int
    ) -> tuple[int, KvRange] | None:
        """The next computed and unsent piece: whole neighbouring layers together while they fit ``largest`` bytes."""
        for index, (box, cursors) in enumerate(zip(ranges, sent, strict=True)):
            head_bytes = self._layer_bytes * box.num_heads // self.spec.kv.num_kv_heads
            most_tokens = max(1, largest // head_bytes)
            if most_tokens > self._cache.block_size:  # whole blocks are copied faster
                most_tokens -= most_tokens % self._cache.block_size
            for layer, start in cursors.items():
                end = min(self._ready[layer], box.token_end, start + most_tokens)
                if end <= start:
                    continue
                last = layer + 1
                while (
                    cursors.get(last) == start
                    and min(self._ready[last], box.token_end) >= end
                    and (last + 1 - layer) * (end - start) * head_bytes <= largest
                ):
                    last += 1
                return index, KvRange(layer, last, start, end, box.head_start, box.head_end)
        return None

    def _read_all(self, pieces: Sequence[tuple[KvRange, Slot | None]]) -> bytes:
        if not self._raw:
            return join([self._encoded(box, slot) for box, slot in pieces])
        if pieces[0][1] is not None:
            return self._read_into_slots([(box, slot) for box, slot in pieces if slot is not None])
        message, blanks = lay_out_raw(self.spec, [box for box, _ in pieces])
        read = [blank_piece(self.spec, box, blank.payload) for (box, _), blank in zip(pieces, blanks, strict=True)]
        self._cache.read_pieces(self._block_table, read, self._event)
        for blank, piece in zip(blanks, read, strict=True):
            seal_in_place(blank, piece.checksum)
        return message

    def _read_into_slots(self, pieces: Sequence[tuple[KvRange, Slot]]) -> bytes:
        read = [blank_piece(self.spec, box, slot.memory[: self.spec.cache_bytes(box)]) for box, slot in pieces]
        self._cache.read_pieces(self._block_table, read, self._event)
        return join(
            [
                seal(self.spec, box, piece.payload, b"", slot.number, piece.checksum)
                for (box, slot), piece in zip(pieces, read, strict=True)
            ]
        )

    def _encoded(self, box: KvRange, slot: Slot | None) -> Frame:
        read = Piece(box, _scratch()[: self.spec.cache_bytes(box)])
        self._cache.read_pieces(self._block_table, [read], self._event)
        raw = memoryview(read.payload)
        scales, payload = encode(self.spec.codec, self.spec.kv.dtype, self.spec.kv.head_dim, raw)
        if slot is None:
            return seal(self.spec, box, payload, scales)
        slot.memory[: len(payload)] = payload
        return seal(self.spec, box, slot.memory[: len(payload)], scales, slot.number)


def _scratch() -> memoryview:
    """Memory of this thread, used again for whatever is encoded: fresh memory costs more than the copy."""
    if not hasattr(_local, "scratch"):
        _local.scratch = memoryview(bytearray(MAX_SHARED_PAYLOAD))
    scratch: memoryview = _local.scratch
    return scratch

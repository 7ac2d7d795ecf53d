"""The sending half of a handoff: reads a prompt's KV into messages of chunks as soon as it is computed.

Knows the cache and the progress of the prefill, but no RPCs. ``_read_message`` runs on a thread of the executor;
everything else runs on the event loop.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncGenerator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Protocol

from overfill.kv.chunks import Chunk, TransferSpec, lay_out_raw, raw_chunk, seal, seal_in_place
from overfill.kv.ranges import Coverage, KvRange
from overfill.kv.shielded import shielded
from overfill.kv.store import DeviceEvent, KvStore
from overfill.kv.wire import ChunkParts, join_chunks
from overfill.rpc.constants import MAX_CHUNK_PAYLOAD, MAX_SHARED_PAYLOAD
from overfill.v1 import common_pb2

_MAX_CHUNKS = 4
"""Limit on chunks per message. The cost of a message hardly depends on its size."""
_QUICK = 0.25
"""Seconds. A stream that takes a message in less time gets a larger one next."""
_local = threading.local()


class MessageGrowth:
    """Limit on the chunks of a stream's next message: doubled after a quick message, reset to 1 after a slow one.

    Both ends count progress in whole messages, so a slow stream sends messages of one chunk.
    """

    def __init__(self) -> None:
        self.max_chunks = 1

    def sent(self, seconds: float) -> None:
        """Adjusts ``max_chunks`` after the stream took ``seconds`` for a message."""
        self.max_chunks = 1 if seconds > _QUICK else min(_MAX_CHUNKS, 2 * self.max_chunks)


@dataclass(frozen=True, slots=True)
class Slot:
    """Shared memory for one payload."""

    number: int
    memory: memoryview


class Slots(Protocol):
    """Shared memory of one stream, for payloads that do not travel. The receiver gives slots back."""

    @property
    def free(self) -> bool: ...

    async def acquire(self) -> Slot: ...


class KvSender:
    """Sends one prompt's KV.

    The engine calls ``begin`` once, then ``mark_ready`` for each layer that it has computed. ``messages`` serves one
    data stream. ``acknowledge`` records the ranges that have arrived. The blocks must not be released before every
    ``messages`` iterator is closed.

    Attributes:
        ready_bytes: bytes of raw KV computed so far, in the layers that travel.
        first_sent_ns, last_sent_ns: monotonic time of the first and the latest message; None means none yet.
    """

    def __init__(self, spec: TransferSpec, store: KvStore, executor: Executor) -> None:
        self.spec = spec
        self._store = store
        self._block_table: Sequence[int] = ()
        self._executor = executor
        self._acknowledged = Coverage(spec.layers, spec.tokens, spec.kv.num_kv_heads)
        # Full-model layer -> the cache holds the positions below this.
        self._ready = dict.fromkeys(spec.layers, spec.tokens[0])
        self._event: dict[int, DeviceEvent | None] = {}
        self._progress = asyncio.Event()  # replaced after each change
        self._layer_bytes = spec.kv.token_layer_bytes
        self._vector_bytes = self._layer_bytes // (2 * spec.kv.num_kv_heads)
        self._raw = spec.codec == common_pb2.KV_CODEC_RAW
        self.ready_bytes = 0
        self.first_sent_ns: int | None = None
        self.last_sent_ns: int | None = None

    @property
    def acknowledged_bytes(self) -> int:
        """Bytes of raw KV that the receiver has acknowledged."""
        return self.spec.total_bytes - self._acknowledged.missing_vectors * self._vector_bytes

    @property
    def complete(self) -> bool:
        """Whether every range has been acknowledged."""
        return self._acknowledged.complete

    def begin(self, block_table: Sequence[int], cached_tokens: int, event: DeviceEvent | None) -> None:
        """Sets the prompt's blocks, which hold all layers of its first ``cached_tokens`` once ``event`` has passed."""
        self._block_table = block_table
        if cached_tokens:
            for layer in self.spec.layers:
                self.mark_ready(layer, cached_tokens, event)

    def mark_ready(self, layer: int, token_end: int, event: DeviceEvent | None) -> None:
        """Records that the cache holds the positions below ``token_end`` of ``layer`` once ``event`` has passed."""
        if layer not in self._ready:  # the decoder does not read this layer
            return
        token_end = max(token_end, self._ready[layer])
        self.ready_bytes += (token_end - self._ready[layer]) * self._layer_bytes
        self._ready[layer] = token_end
        self._event[layer] = event
        self._progress.set()
        self._progress = asyncio.Event()

    def acknowledge(self, kv_range: KvRange) -> None:
        """Records that ``kv_range`` has arrived.

        Raises:
            TransferFailed: it lies outside the transfer, or was acknowledged before.
        """
        self._acknowledged.add(kv_range)

    def check_ranges(self, ranges: Sequence[KvRange]) -> None:
        """Raises TransferFailed if a range lies outside the transfer or overlaps another one."""
        self._acknowledged.check_request(ranges)

    async def messages(self, ranges: Sequence[KvRange], slots: Slots | None = None) -> AsyncGenerator[bytes, None]:
        """Yields messages whose chunks cover ``ranges``, each as soon as its KV is computed.

        Chunks that are ready together share a message. While one message is sent, the next is read.

        Args:
            ranges: ranges that ``check_ranges`` accepts.
            slots: shared memory for the payloads, each at most ``MAX_SHARED_PAYLOAD`` bytes. None puts payloads into
                the messages, each at most ``MAX_CHUNK_PAYLOAD`` bytes.
        """
        # For each range: full-model layer -> first position that is not sent yet.
        sent = [dict.fromkeys(kv_range.layers, kv_range.token_start) for kv_range in ranges]
        reading: asyncio.Future[bytes] | None = None
        growth = MessageGrowth()
        try:
            while reading is not None or any(sent):
                if reading is None:
                    reading = await self._begin(ranges, sent, slots, growth.max_chunks)
                    continue
                message = await shielded(reading)
                reading = None
                if self._next_range(ranges, sent, 1) is not None and (slots is None or slots.free):
                    reading = await self._begin(ranges, sent, slots, growth.max_chunks)
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
        self, ranges: Sequence[KvRange], sent: Sequence[dict[int, int]], slots: Slots | None, max_chunks: int
    ) -> asyncio.Future[bytes]:
        """Waits for the next chunk and a slot for it, then starts to read the stream's next message.

        The first and the last messages are small, because nothing overlaps reading the first or writing the last one.
        """
        largest = MAX_CHUNK_PAYLOAD if slots is None else MAX_SHARED_PAYLOAD
        while self._next_range(ranges, sent, largest) is None:
            await self._progress.wait()
        chosen: list[tuple[KvRange, Slot | None]] = []
        max_chunks = min(max_chunks, max(1, self._unsent_bytes(ranges, sent) // (2 * largest)))
        while len(chosen) < max_chunks and (not chosen or slots is None or slots.free):
            found = self._next_range(ranges, sent, largest)
            if found is None:
                break
            slot = await slots.acquire() if slots is not None else None
            index, kv_range = found
            for layer in kv_range.layers:
                if kv_range.token_end == ranges[index].token_end:
                    del sent[index][layer]
                else:
                    sent[index][layer] = kv_range.token_end
            chosen.append((kv_range, slot))
        return asyncio.get_running_loop().run_in_executor(self._executor, self._read_message, chosen)

    def _unsent_bytes(self, ranges: Sequence[KvRange], sent: Sequence[dict[int, int]]) -> int:
        """Bytes of raw KV of ``ranges`` that are not sent."""
        num_vectors = sum(
            2 * kv_range.num_heads * (kv_range.token_end - start)
            for kv_range, cursors in zip(ranges, sent, strict=True)
            for start in cursors.values()
        )
        return num_vectors * self._vector_bytes

    def _next_range(
        self, ranges: Sequence[KvRange], sent: Sequence[dict[int, int]], largest: int
    ) -> tuple[int, KvRange] | None:
        """Finds the next range that is computed, not sent and at most ``largest`` bytes.

        Neighbouring layers share a chunk if they fit.

        Returns:
            Its index in ``ranges`` and the range itself; None if no layer has progressed.
        """
        for index, (kv_range, cursors) in enumerate(zip(ranges, sent, strict=True)):
            token_bytes = self._layer_bytes * kv_range.num_heads // self.spec.kv.num_kv_heads  # in one layer
            max_tokens = max(1, largest // token_bytes)
            if max_tokens > self._store.block_size:  # whole blocks are copied faster
                max_tokens -= max_tokens % self._store.block_size
            for layer, start in cursors.items():
                end = min(self._ready[layer], kv_range.token_end, start + max_tokens)
                if end <= start:
                    continue
                last = layer + 1
                while (
                    cursors.get(last) == start
                    and min(self._ready[last], kv_range.token_end) >= end
                    and (last + 1 - layer) * (end - start) * token_bytes <= largest
                ):
                    last += 1
                return index, KvRange(layer, last, start, end, *kv_range.heads)
        return None

    def _read_message(self, chosen: Sequence[tuple[KvRange, Slot | None]]) -> bytes:
        """A message with a chunk of each range; its payload is in the range's slot if there is one."""
        if not self._raw:
            return join_chunks([self._encode(kv_range, slot) for kv_range, slot in chosen])
        if chosen[0][1] is not None:
            return self._read_into_slots([(kv_range, slot) for kv_range, slot in chosen if slot is not None])
        message, unwritten = lay_out_raw(self.spec, [kv_range for kv_range, _ in chosen])
        chunks = [raw_chunk(self.spec, r, place.payload) for (r, _), place in zip(chosen, unwritten, strict=True)]
        self._store.read(self._block_table, chunks, self._event)
        for place, chunk in zip(unwritten, chunks, strict=True):
            seal_in_place(place, chunk.checksum)
        return message

    def _read_into_slots(self, chosen: Sequence[tuple[KvRange, Slot]]) -> bytes:
        chunks = [raw_chunk(self.spec, r, slot.memory[: self.spec.raw_bytes(r)]) for r, slot in chosen]
        self._store.read(self._block_table, chunks, self._event)
        return join_chunks(
            [
                seal(self.spec, kv_range, chunk.payload, b"", slot.number, chunk.checksum)
                for (kv_range, slot), chunk in zip(chosen, chunks, strict=True)
            ]
        )

    def _encode(self, kv_range: KvRange, slot: Slot | None) -> ChunkParts:
        """A chunk in the transfer's codec."""
        from overfill.kv.codecs import encode  # imports torch, which a process that sends raw KV may lack

        raw = _scratch()[: self.spec.raw_bytes(kv_range)]
        self._store.read(self._block_table, [Chunk(kv_range, raw)], self._event)
        scales, payload = encode(self.spec.codec, self.spec.kv.dtype, self.spec.kv.head_dim, raw)
        if slot is None:
            return seal(self.spec, kv_range, payload, scales)
        slot.memory[: len(payload)] = payload
        return seal(self.spec, kv_range, slot.memory[: len(payload)], scales, slot.number)


def _scratch() -> memoryview:
    """This thread's memory for KV to encode. It is reused, because allocating it costs more than the copy."""
    if not hasattr(_local, "scratch"):
        _local.scratch = memoryview(bytearray(MAX_SHARED_PAYLOAD))
    scratch: memoryview = _local.scratch
    return scratch

"""The sending half of a handoff: reads a prompt's KV into messages of chunks as soon as it is computed.

Knows the cache and the progress of the prefill, but no RPCs. ``_read_message`` runs on a thread of the executor;
everything else runs on the event loop.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Protocol

from overfill.kv.chunks import Chunk, TransferSpec, digest, new_chunk
from overfill.kv.ranges import Coverage, KvRange, share_among_streams
from overfill.kv.shielded import shielded
from overfill.kv.store import DeviceEvent, KvStore
from overfill.kv.wire import join_chunks, lay_out_message
from overfill.rpc.constants import MAX_CHUNK_PAYLOAD, MAX_SHARED_PAYLOAD
from overfill.v1 import common_pb2

_MAX_CHUNKS = 4
"""Limit on chunks per message. The cost of a message hardly depends on its size."""
_QUICK = 0.25
"""Seconds. A stream that takes a message in less time gets a larger one next."""
_SHORT = 32 << 10
"""Bytes that the event loop reads itself, where no device computes them: a thread would take longer to wake up."""
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
    data stream. ``acknowledge`` records the ranges that have arrived. ``whole_message`` has a little KV at once. The
    blocks must not be released before it has returned and every ``messages`` iterator is closed.

    Where ranks hold the KV, each has a sender for streams, and the process with the lease has one for the books.

    Attributes:
        ready_bytes: bytes of raw KV computed so far, in the layers that travel.
        first_sent_ns, last_sent_ns: monotonic time of the first and the latest message; None means none yet.
    """

    def __init__(self, spec: TransferSpec, store: KvStore, executor: Executor) -> None:
        self.spec = spec
        self._store = store
        self._block_table: Sequence[int] = ()
        self._executor = executor
        self._acknowledged = Coverage(spec.layers, spec.tokens, (0, spec.kv.num_kv_heads))
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

    async def whole_message(self) -> bytes:
        """Returns one message of all KV that travels. Call it once the whole prompt is computed."""
        (ranges,) = share_among_streams(self.spec.layers, self.spec.tokens, (0, self.spec.kv.num_kv_heads), 1)
        message = await shielded(self._read([new_chunk(self.spec, kv_range) for kv_range in ranges]))
        self.first_sent_ns = self.last_sent_ns = time.monotonic_ns()
        return message

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
        chosen: list[Chunk] = []
        max_chunks = min(max_chunks, max(1, self._unsent_bytes(ranges, sent) // (2 * largest)))
        while len(chosen) < max_chunks and (not chosen or slots is None or slots.free):
            found = self._next_range(ranges, sent, largest)
            if found is None:
                break
            index, kv_range = found
            chosen.append(await self._new_chunk(kv_range, slots))
            for layer in kv_range.layers:
                if kv_range.token_end == ranges[index].token_end:
                    del sent[index][layer]
                else:
                    sent[index][layer] = kv_range.token_end
        return self._read(chosen)

    def _read(self, chunks: Sequence[Chunk]) -> asyncio.Future[bytes]:
        """Starts to read the message of ``chunks``."""
        loop = asyncio.get_running_loop()
        if sum(self.spec.raw_bytes(chunk.range) for chunk in chunks) > _SHORT or any(self._event.values()):
            return loop.run_in_executor(self._executor, self._read_message, chunks)
        read: asyncio.Future[bytes] = loop.create_future()
        read.set_result(self._read_message(chunks))
        return read

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

    async def _new_chunk(self, kv_range: KvRange, slots: Slots | None) -> Chunk:
        """A chunk to read; its payload is a slot, or missing until the message is made."""
        if slots is None:
            return new_chunk(self.spec, kv_range)
        slot = await slots.acquire()
        return new_chunk(self.spec, kv_range, slot.memory[: self.spec.payload_bytes(kv_range)], slot=slot.number)

    def _read_message(self, chunks: Sequence[Chunk]) -> bytes:
        """Reads the chunks' KV and returns the message of them."""
        if not self._raw:
            for chunk in chunks:
                self._encode(chunk)
            return join_chunks(chunks)
        if chunks[0].slot is not None:
            self._store.read(self._block_table, chunks, self._event)
            return join_chunks(chunks)
        return read_message(self.spec, self._store, self._block_table, chunks, self._event)

    def _encode(self, chunk: Chunk) -> None:
        """Reads a chunk's KV in the transfer's codec."""
        from overfill.kv.codecs import encode  # imports torch, which a process that sends raw KV may lack

        raw = _scratch()[: self.spec.raw_bytes(chunk.range)]
        self._store.read(self._block_table, [Chunk(chunk.range, raw)], self._event)
        chunk.scales, codes = encode(self.spec.kv.dtype, self.spec.kv.head_dim, raw)
        if chunk.slot is None:
            chunk.payload = codes
        else:
            memoryview(chunk.payload)[:] = codes
        chunk.checksum = digest(chunk.header, chunk.scales, codes)


def read_message(
    spec: TransferSpec,
    store: KvStore,
    block_table: Sequence[int],
    chunks: Sequence[Chunk],
    after: Mapping[int, DeviceEvent | None],
) -> bytes:
    """Reads the raw KV of ``chunks``, as ``KvStore.read``, into one message of them."""
    message, checksums = lay_out_message(chunks, [spec.payload_bytes(chunk.range) for chunk in chunks])
    store.read(block_table, chunks, after)
    for place, chunk in zip(checksums, chunks, strict=True):
        place[:] = chunk.checksum.to_bytes(8, "little")
    return message


def _scratch() -> memoryview:
    """This thread's memory for KV to encode. It is reused, because allocating it costs more than the copy."""
    if not hasattr(_local, "scratch"):
        _local.scratch = memoryview(bytearray(MAX_SHARED_PAYLOAD))
    scratch: memoryview = _local.scratch
    return scratch

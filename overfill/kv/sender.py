"""The sending half of a handoff: hands out each piece of a prompt's KV as soon as it is computed.

Knows the cache and the progress of the prefill; knows nothing of RPCs. Everything but ``_read`` runs on
the event loop.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import Executor

from overfill.kv.cache import DeviceEvent, KvCache
from overfill.kv.chunks import TransferSpec, seal
from overfill.kv.joining import to_the_end
from overfill.kv.ranges import Coverage, KvRange
from overfill.rpc.constants import MAX_CHUNK_PAYLOAD
from overfill.v1 import kv_pb2


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
        self.ready_bytes = 0
        self.first_sent_ns: int | None = None
        self.last_sent_ns: int | None = None

    @property
    def acknowledged_bytes(self) -> int:
        total = len(self.spec.layers) * (self.spec.tokens[1] - self.spec.tokens[0]) * self._layer_bytes
        return total - self._acknowledged.missing_cells * self._layer_bytes // self.spec.kv.num_kv_heads

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

    async def chunks(self, ranges: Sequence[KvRange]) -> AsyncIterator[kv_pb2.KvChunk]:
        """Chunks that cover ``ranges``, each as soon as it is computed; at most 1 MiB of payload.

        ``ranges`` have passed ``check_ranges``.
        """
        loop = asyncio.get_running_loop()
        sent = [dict.fromkeys(range(box.layer_start, box.layer_end), box.token_start) for box in ranges]
        while any(sent):
            piece = self._next_piece(ranges, sent)
            if piece is None:
                await self._progress.wait()
                continue
            index, box = piece
            chunk = await to_the_end(loop.run_in_executor(self._executor, self._read, box))
            if self.first_sent_ns is None:
                self.first_sent_ns = time.monotonic_ns()
            yield chunk
            self.last_sent_ns = time.monotonic_ns()
            for layer in range(box.layer_start, box.layer_end):
                if box.token_end == ranges[index].token_end:
                    del sent[index][layer]
                else:
                    sent[index][layer] = box.token_end

    def _next_piece(self, ranges: Sequence[KvRange], sent: Sequence[dict[int, int]]) -> tuple[int, KvRange] | None:
        """The next computed and unsent piece: whole neighbouring layers together while they fit one chunk."""
        for index, (box, cursors) in enumerate(zip(ranges, sent, strict=True)):
            head_bytes = self._layer_bytes * box.num_heads // self.spec.kv.num_kv_heads
            most_tokens = max(1, MAX_CHUNK_PAYLOAD // head_bytes)
            for layer, start in cursors.items():
                end = min(self._ready[layer], box.token_end, start + most_tokens)
                if end <= start:
                    continue
                last = layer + 1
                while (
                    cursors.get(last) == start
                    and min(self._ready[last], box.token_end) >= end
                    and (last + 1 - layer) * (end - start) * head_bytes <= MAX_CHUNK_PAYLOAD
                ):
                    last += 1
                return index, KvRange(layer, last, start, end, box.head_start, box.head_end)
        return None

    def _read(self, box: KvRange) -> kv_pb2.KvChunk:
        payload = self._cache.read(
            self._block_table,
            range(box.layer_start, box.layer_end),
            (box.token_start, box.token_end),
            (box.head_start, box.head_end),
            after=self._event.get(box.layer_end - 1),  # layers are computed in order
        )
        return seal(self.spec, box, payload)

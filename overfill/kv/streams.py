"""The streams of PullKv that read one transfer's blocks. The blocks may be freed once all streams have been joined."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing

from overfill.errors import InvalidRequest, TransferFailed
from overfill.kv.ranges import KvRange
from overfill.kv.sender import KvSender
from overfill.kv.shm import ShmServer
from overfill.rpc.constants import MAX_DATA_STREAMS
from overfill.v1 import prefill_pb2


class TransferStreams:
    """Streams of one transfer, served from this process. Use it on one event loop.

    Args:
        sender: reads the blocks.
        heads: half-open range of the KV heads that this process holds; None means all.

    Attributes:
        ended: True once no new stream may read the blocks.
    """

    def __init__(self, sender: KvSender, heads: tuple[int, int] | None = None) -> None:
        self._sender = sender
        self._heads = heads or (0, sender.spec.kv.num_kv_heads)
        self._readers: set[asyncio.Task[object]] = set()
        self.ended = False

    async def join(self) -> None:
        """Cancels every stream, and waits until all have ended."""
        self.ended = True
        while self._readers:
            for task in self._readers:
                task.cancel()
            await asyncio.wait(self._readers)

    async def serve(self, request: prefill_pb2.PullKvRequest, shm_server: ShmServer) -> AsyncGenerator[bytes, None]:
        """Yields one stream's encoded ``KvChunk``s. Runs in the task of its RPC, which ``join`` cancels.

        Raises:
            TransferFailed: the transfer has ended, is of another attempt, or has too many streams.
            InvalidRequest: the ranges overlap, or lie outside the transfer or the heads.
            Unavailable: the request names shared memory that does not exist.
        """
        sender = self._sender
        if self.ended or sender.spec.attempt != request.attempt:
            raise unknown_transfer()
        if len(self._readers) >= MAX_DATA_STREAMS:
            raise TransferFailed(f"the transfer has {MAX_DATA_STREAMS} streams, which is the maximum")
        ranges = [KvRange.from_proto(box) for box in request.ranges]
        try:
            sender.check_ranges(ranges)
        except TransferFailed as error:
            raise InvalidRequest("ranges", str(error)) from error
        first, end = self._heads
        if beyond := next((each for each in ranges if each.head_start < first or each.head_end > end), None):
            raise InvalidRequest("ranges", f"{beyond}: this address serves the KV heads {first}:{end} only")
        task = asyncio.current_task()
        assert task is not None
        slots = shm_server.link(request.link_id).stream(request.stream) if request.link_id else None
        self._readers.add(task)
        try:
            async with aclosing(sender.messages(ranges, slots)) as messages:
                async for message in messages:
                    yield message
        finally:
            self._readers.discard(task)
            if slots is not None:
                slots.writes_finished()


def unknown_transfer() -> TransferFailed:
    """The error for a stream of a transfer that this process does not serve."""
    return TransferFailed("unknown transfer: it has ended or was never started here")

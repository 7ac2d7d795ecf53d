"""Pulls KV over data streams into blocks of this process, with repeats of what is wrong or missing.

``LocalPuller`` needs an event loop, the blocks and addresses. It knows no requests, no prefill RPC and no
acknowledgements, so that a rank can pull its own heads while another process holds the control stream.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import asynccontextmanager
from dataclasses import dataclass

import grpc.aio

from overfill.errors import InternalError, InvalidRequest, OverfillError, TransferFailed, Unavailable
from overfill.kv.chunks import Chunk, check, check_head, wrong_checksum
from overfill.kv.ranges import Coverage, KvRange, share_among_streams
from overfill.kv.ranks import Moved, Pull, root_cause
from overfill.kv.shielded import shielded
from overfill.kv.shm import ShmClient
from overfill.kv.store import KvStore, LayerTargets
from overfill.kv.wire import parse_message, pull_kv
from overfill.rpc.access import Role
from overfill.rpc.calls import responses
from overfill.rpc.channel import open_channel
from overfill.rpc.constants import MAX_CHUNK_PAYLOAD, STALL_TIMEOUT
from overfill.rpc.tls import Credentials
from overfill.v1 import common_pb2, kv_pb2, prefill_pb2

MAX_REPEATS = 3
"""Limit on repeats of a data stream, each for the ranges that are still missing, and of ``PrefillAtOnce``, for all KV.
The transfer then fails."""

MAX_IDLE_TIME = 300.0
"""Seconds without use after which connections to a worker are closed, at the next new one. The worker may have gone:
pods and replicas do not return under their old name."""

_STREAM_BYTES = MAX_CHUNK_PAYLOAD
"""Bytes of raw KV for which a further stream is opened. For fewer, a stream costs more CPU time than the copy."""

_REPEAT_DELAY = 0.02  # seconds before the first repeat; doubled for each further one
_REPEATABLE = (TransferFailed, Unavailable, InternalError)

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class _Opened:
    """The channels to one address."""

    channels: list[grpc.aio.Channel]
    users: int = 0
    used_at: float = 0.0  # time.monotonic() when the last user left


class DataChannels:
    """Connections to data addresses, ``streams`` for each, opened on first use."""

    def __init__(self, streams: int, tls: Credentials | None) -> None:
        self._streams = streams
        self._tls = tls
        self._opened: dict[str, _Opened] = {}

    @asynccontextmanager
    async def use(self, addresses: Iterable[str]) -> AsyncIterator[Mapping[str, Sequence[grpc.aio.Channel]]]:
        """Provides the channels to each of ``addresses``. Closes others that are idle, if it opens one."""
        addresses = set(addresses)
        idle = self._take_idle() if not addresses <= self._opened.keys() else []
        for address in addresses:
            if address not in self._opened:
                # The answer to a ping waits behind KV, on a lossy link for more than KEEPALIVE_TIMEOUT. Pings on the
                # control channel detect a silent worker.
                channels = [
                    open_channel(address, self._tls, STALL_TIMEOUT, role=Role.WORKER) for _ in range(self._streams)
                ]
                self._opened[address] = _Opened(channels)
            self._opened[address].users += 1
        try:
            await _close(idle)
            yield {address: self._opened[address].channels for address in addresses}
        finally:
            for address in addresses:
                self._opened[address].users -= 1
                self._opened[address].used_at = time.monotonic()

    def _take_idle(self) -> list[_Opened]:
        before = time.monotonic() - MAX_IDLE_TIME
        idle = [address for address, one in self._opened.items() if not one.users and one.used_at < before]
        return [self._opened.pop(address) for address in idle]

    async def close(self) -> None:
        """Closes every channel. None may be in use."""
        await _close(self._opened.values())
        self._opened.clear()


async def _close(opened: Iterable[_Opened]) -> None:
    await asyncio.gather(*(channel.close(None) for one in opened for channel in one.channels))


class LocalPuller:
    """Pulls into blocks of this process; a ``Puller``.

    Args:
        store: the blocks.
        executor: threads that check received KV and write it to the store.
        channels: connections to the data addresses.
        link: shared memory of the prefill worker; None means that payloads travel.
        heads: half-open range of KV heads that the store holds and a pull moves; None means all.
    """

    def __init__(
        self,
        store: KvStore,
        executor: Executor,
        channels: DataChannels,
        link: ShmClient | None = None,
        heads: tuple[int, int] | None = None,
    ) -> None:
        self.store = store
        self.executor = executor
        self.channels = channels
        self.link = link
        self.heads = heads

    async def pull(self, pull: Pull, on_moved: Callable[[Moved], None]) -> None:
        """As ``Puller.pull``. Each stream is repeated up to ``MAX_REPEATS`` times, for the ranges it left out."""
        transfer = _Transfer(self, pull, on_moved)
        own = [source for source in pull.sources if transfer.heads_at(source)]
        try:
            async with self.channels.use(source.address for source in own) as channels, asyncio.TaskGroup() as group:
                for source in own:
                    for channel, ranges in transfer.streams(source, channels[source.address]):
                        group.create_task(transfer.pull(channel, ranges, pull.timeout))
        except BaseExceptionGroup as errors:
            raise root_cause(errors) from errors

    async def take(self, pull: Pull, message: bytes, on_moved: Callable[[Moved], None]) -> None:
        """Writes the KV of one message. Arguments and end are as of ``pull``; raises TransferFailed if it is wrong."""
        await _Transfer(self, pull, on_moved).take(message, None)


class _Transfer:
    """One pull; arguments as of ``Puller.pull``."""

    def __init__(self, puller: LocalPuller, pull: Pull, on_moved: Callable[[Moved], None]) -> None:
        spec = pull.spec
        self._store = puller.store
        self._executor = puller.executor
        self._link = puller.link
        self._peer = pull.peer
        self._spec = spec
        self._blocks = pull.blocks
        self._on_moved = on_moved
        self._heads = puller.heads or (0, spec.kv.num_kv_heads)
        self._targets = LayerTargets(
            {layer: [i for i, source in enumerate(pull.layer_map) if source == layer] for layer in spec.layers}
        )
        # It marks a chunk before it is written.
        self._coverage = Coverage(spec.layers, spec.tokens, self._heads)

    def heads_at(self, source: kv_pb2.DataAddress) -> range:
        """The heads that this transfer pulls from ``source``."""
        end = source.first_kv_head + source.num_kv_heads
        return range(max(source.first_kv_head, self._heads[0]), min(end, self._heads[1]))

    def streams(
        self, source: kv_pb2.DataAddress, channels: Sequence[grpc.aio.Channel]
    ) -> Iterator[tuple[grpc.aio.Channel, list[KvRange]]]:
        """Yields the data streams to ``source``: the channel and the ranges of each."""
        heads = self.heads_at(source)
        num_bytes = self._spec.total_bytes * len(heads) // self._spec.kv.num_kv_heads
        streams = min(len(channels), -(-num_bytes // _STREAM_BYTES))
        shares = share_among_streams(self._spec.layers, self._spec.tokens, (heads.start, heads.stop), streams)
        return zip(channels, shares, strict=False)

    async def pull(self, channel: grpc.aio.Channel, ranges: list[KvRange], timeout: float | None) -> None:
        """Pulls ``ranges``. Requests the ranges that a wrong chunk or a broken stream leaves out again."""
        for repeats in itertools.count():
            error: OverfillError | None = None
            # On a repeat, payloads travel.
            link = self._link if repeats == 0 else None
            link = link if link is not None and link.alive else None
            try:
                await self._pull_once(channel, ranges, timeout, link)
            except _REPEATABLE as failure:
                error = failure
            ranges = self._coverage.missing(ranges)
            if ranges and error is None:
                error = TransferFailed(f"{self._peer} left out {ranges[0]}")
            if error is None:
                return
            self._on_moved(Moved(broken_streams=1))
            logger.warning("%s: a data stream broke with %d ranges missing: %s", self._peer, len(ranges), error)
            if not ranges:
                return
            if repeats == MAX_REPEATS:
                raise error
            await asyncio.sleep(_REPEAT_DELAY * 2**repeats)

    async def _pull_once(
        self, channel: grpc.aio.Channel, ranges: list[KvRange], timeout: float | None, link: ShmClient | None
    ) -> None:
        stream = link.new_stream() if link is not None else 0
        request = prefill_pb2.PullKvRequest(
            transfer_id=self._spec.transfer_id,
            attempt=self._spec.attempt,
            ranges=[kv_range.to_proto() for kv_range in ranges],
            link_id=link.id if link is not None else b"",
            stream=stream,
        )
        call = pull_kv(channel, request, timeout)
        try:
            async for message in responses(call, self._peer):
                await self.take(message, link)
        except InvalidRequest as error:  # it concerns this worker's ranges, not the user's request
            raise TransferFailed(f"{self._peer} refused the ranges: {error}") from error
        finally:
            call.cancel()
            if link is not None:
                link.end_stream(stream)

    async def take(self, message: bytes, link: ShmClient | None) -> None:
        """Has a thread write a message; as ``_write_message``, and reports what is in place, even if it raises."""
        in_place: list[Chunk] = []
        write = asyncio.get_running_loop().run_in_executor(self._executor, self._write_message, message, link, in_place)
        try:
            await shielded(write)
        finally:
            shared = [chunk for chunk in in_place if chunk.slot is not None]
            if link is not None:
                link.give_back([chunk.slot for chunk in shared if chunk.slot is not None])
            if in_place:
                self._on_moved(
                    Moved(
                        [chunk.range for chunk in in_place],
                        kv_bytes=sum(chunk.size for chunk in in_place),
                        shared_bytes=sum(chunk.size for chunk in shared),
                        chunks=len(in_place),
                    )
                )

    def _write_message(self, message: bytes, link: ShmClient | None, in_place: list[Chunk]) -> None:
        """Writes a message's chunks up to the first wrong one and appends them to ``in_place``, even if it raises.

        Raises:
            TransferFailed: a chunk is wrong.
        """
        received: list[Chunk] = []
        chunks: list[Chunk] = []  # the same ones as the store takes them
        try:
            for chunk in parse_message(message):
                chunks.append(self._claim(chunk, link))
                received.append(chunk)
        finally:
            num_written = self._store.write(self._blocks, self._targets, chunks)
            in_place += received[:num_written]
            for chunk in chunks[num_written:]:
                self._coverage.remove(chunk.range)
        if num_written < len(chunks):
            raise wrong_checksum(chunks[num_written].range)

    def _claim(self, received: Chunk, link: ShmClient | None) -> Chunk:
        """The chunk to write. Marks its range in the coverage first, so that no other thread writes there.

        The checksum of a raw chunk is compared while it is written, that of an encoded one here.
        """
        if received.slot is not None:
            if link is None:
                raise TransferFailed(f"{self._peer} put a payload into memory that is not shared")
            received.payload = link.payload(received.head.shared)
        spec, codec = self._spec.kv, self._spec.codec
        if codec == common_pb2.KV_CODEC_RAW:
            chunk = check_head(self._spec, received)
        else:
            # Imported here, because it imports torch, which a process without codecs may lack.
            from overfill.kv.codecs import check_scales, decode

            kv_range = check(self._spec, received)
            if codec == self._store.codec:
                check_scales(received.scales)
                chunk = Chunk(kv_range, received.payload, scales=received.scales)
            else:
                chunk = Chunk(kv_range, decode(spec.dtype, spec.head_dim, received.scales, received.payload))
        self._coverage.add(chunk.range)
        return chunk

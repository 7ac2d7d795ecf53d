"""The receiving half of a handoff: one prompt prefilled elsewhere, its KV written into our blocks.

``PrefillPeer`` is a decode worker's connection to one prefill worker: a control channel and ``streams`` data
channels, each its own connection, checked once by the handshake. ``PromptPull`` is one prompt on it. Token ids
and bytes only; sampling and scheduling are the engine's.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import secrets
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import grpc.aio

from overfill.errors import (
    DeadlineExceeded,
    Incompatible,
    InternalError,
    InvalidRequest,
    OverfillError,
    RequestCancelled,
    TransferFailed,
    Unavailable,
)
from overfill.kv.cache import KvCache
from overfill.kv.chunks import TRANSFER_ID_BYTES, TransferSpec, check, check_head, wrong_checksum
from overfill.kv.codecs import check_scales, decode
from overfill.kv.handshake import KvIdentity, check_compatible
from overfill.kv.native.library import Rows
from overfill.kv.pieces import Piece
from overfill.kv.ranges import Coverage, KvRange, share_out
from overfill.kv.shielded import shielded
from overfill.kv.shm import ShmClient
from overfill.kv.spec import KvSpec
from overfill.kv.stall import DEFAULT_LIMITS, TransferLimits, watch_transfer
from overfill.kv.wire import WireChunk, decode_all, pull_kv
from overfill.rpc.calls import checked_response, checked_write, responses
from overfill.rpc.channel import open_channel
from overfill.rpc.tls import Credentials
from overfill.telemetry import tracing
from overfill.v1 import common_pb2, decode_pb2, kv_pb2, prefill_pb2, prefill_pb2_grpc

_DESCRIBE_TIMEOUT = 5.0  # seconds

MAX_REPEATS = 3
"""Times a data stream is begun anew for what is missing of its ranges, before the transfer is given up."""


_ACK_DELAY = 0.01  # seconds in which acknowledgements gather, but for the last ones
_FAREWELL = 1.0  # seconds for a prefill worker to end its RPC, once it has nothing more that is wanted
_REPEAT_DELAY = 0.02  # seconds before the first repeat, twice as long before each further one
_REPEATABLE = (TransferFailed, Unavailable, InternalError)

logger = logging.getLogger(__name__)


def write_chunks(cache: KvCache, blocks: Sequence[int], rows: Rows, pieces: Sequence[Piece]) -> int:
    """Writes chunks into the blocks of a sequence; returns how many, from the first, are not damaged and in place."""
    return cache.write_pieces(blocks, rows, pieces)


@dataclass(frozen=True, slots=True)
class PromptRequest:
    """What a prefill worker needs to know to compute one prompt for us."""

    request_id: str
    attempt: int
    prompt_token_ids: Sequence[int]
    sampling: common_pb2.SamplingParams
    sample_index: int
    sample_first_token: bool
    cache_namespace: str = ""
    trace: bool = False
    codec: common_pb2.KvCodec = common_pb2.KV_CODEC_RAW  # wished for; raw where the prefill worker does not offer it


@dataclass(frozen=True, slots=True)
class FirstTokenArrived:
    """The full model's token, with what the prefill worker measured, in nanoseconds."""

    token: prefill_pb2.FirstToken
    queue_ns: int
    received_ns: int  # our monotonic clock


@dataclass(slots=True)
class PullStats:
    """A handoff in numbers; times are nanoseconds since the request was sent."""

    started_ns: int = field(default_factory=time.monotonic_ns)
    first_token_ns: int = 0
    first_kv_ns: int = 0
    last_kv_ns: int = 0
    kv_bytes: int = 0
    kv_chunks: int = 0
    shared_bytes: int = 0  # of kv_bytes, through memory shared with the prefill worker
    cached_tokens: int = 0  # of the prompt, in the prefill worker's prefix cache
    held_tokens: int = 0  # of the prompt, in our blocks before
    broken_streams: int = 0  # data streams that ended with a wrong chunk, too little or an error
    prefill: kv_pb2.PrefillTrace | None = None

    def to_proto(self) -> kv_pb2.HandoffTrace:
        return kv_pb2.HandoffTrace(
            first_token_received_ns=self.first_token_ns,
            first_kv_received_ns=self.first_kv_ns,
            last_kv_received_ns=self.last_kv_ns,
            kv_bytes=self.kv_bytes,
            kv_chunks=self.kv_chunks,
            broken_streams=self.broken_streams,
            prefill=self.prefill,
            cached_tokens=self.cached_tokens,
            held_tokens=self.held_tokens,
            shared_bytes=self.shared_bytes,
        )


class PrefillPeer:
    """A checked connection to one incarnation of one prefill worker.

    Args:
        shm: whether to share memory with a worker that is on this host and offers it.

    Attributes:
        link: shared memory, once the handshake has found it.
    """

    def __init__(
        self, target: decode_pb2.AssignPrefill, streams: int, tls: Credentials | None, shm: bool = True
    ) -> None:
        self.target = target
        self.link: ShmClient | None = None
        self.codecs: frozenset[int] = frozenset()
        self._shm = shm
        self._control = open_channel(target.address, tls)
        self.data = [open_channel(target.data_address or target.address, tls) for _ in range(streams)]
        self.control = prefill_pb2_grpc.PrefillStub(self._control)

    async def handshake(self, mine: KvIdentity) -> None:
        """Raises Incompatible with the list of differing fields, or Unavailable when the worker is not there."""
        name = self.target.worker_id
        call = self.control.Describe(prefill_pb2.DescribePrefillRequest(), timeout=_DESCRIBE_TIMEOUT)
        try:
            described: prefill_pb2.DescribePrefillResponse = await checked_response(call, name)
        except (DeadlineExceeded, RequestCancelled, Unavailable) as error:
            raise Unavailable(f"prefill worker {name} did not answer: {error}") from error
        if described.incarnation != self.target.incarnation:
            raise Unavailable(f"prefill worker {name} was restarted")
        theirs = KvIdentity(
            described.wire_version,
            described.model.full_digest,
            described.model.tokenizer_digest,
            KvSpec.from_proto(described.kv),
        )
        check_compatible(mine, theirs, f"prefill worker {name} (software {described.software_version})")
        if common_pb2.KV_CODEC_RAW not in described.codecs:
            raise Incompatible(f"prefill worker {name} cannot send KV uncompressed", ["codecs"])
        self.codecs = frozenset(described.codecs)
        if self._shm and described.HasField("shm"):
            try:
                self.link = await ShmClient.connect(described.shm)
            except (OSError, TimeoutError, ValueError) as error:
                logger.info("prefill worker %s shares no memory with this one: %s", name, error)

    @property
    def lost_link(self) -> bool:
        """Whether memory was shared, and is no longer."""
        return self.link is not None and not self.link.alive

    async def close(self) -> None:
        if self.link is not None:
            self.link.close()
        await asyncio.gather(*(channel.close(None) for channel in (self._control, *self.data)))


class PromptPull:
    """One prompt on its way from a prefill worker into ``blocks``.

    Every task and thread that may touch the blocks has ended when ``run`` ends, however it ends.

    Args:
        kv: geometry of the full model's KV.
        layer_map: ``layer_map[i]`` is the full-model layer whose KV cache layer i takes.
        held_tokens: leading prompt tokens whose KV is in ``blocks`` already.
        limits: how long the transfer may take.

    Raises (from ``run``):
        TransferFailed: a chunk was wrong, a range is missing, or ``limits`` are exceeded.
        Unavailable, Overloaded, DeadlineExceeded, ...: as the prefill worker answered.
    """

    def __init__(
        self,
        peer: PrefillPeer,
        request: PromptRequest,
        kv: KvSpec,
        layer_map: Sequence[int],
        cache: KvCache,
        blocks: Sequence[int],
        executor: Executor,
        held_tokens: int = 0,
        limits: TransferLimits = DEFAULT_LIMITS,
    ) -> None:
        layers = tuple(sorted(set(layer_map)))
        self._peer = peer
        self._worker = f"prefill worker {peer.target.worker_id}"
        self._request = request
        self._cache = cache
        self._blocks = blocks
        self._executor = executor
        self._limits = limits
        self._rows = Rows({layer: [i for i, source in enumerate(layer_map) if source == layer] for layer in layers})
        self._spec = TransferSpec(
            secrets.token_bytes(TRANSFER_ID_BYTES),
            request.attempt,
            kv,
            layers,
            (held_tokens, len(request.prompt_token_ids)),
            request.codec if request.codec in peer.codecs else common_pb2.KV_CODEC_RAW,
        )
        self._coverage = Coverage(layers, self._spec.tokens, kv.num_kv_heads)
        self._outgoing: asyncio.Queue[prefill_pb2.PrefillRequest] = asyncio.Queue()
        self._unwritten = self._coverage.missing_cells  # claimed by a checked chunk is not yet written
        self._farewell = asyncio.timeout(None)
        self._whole = asyncio.Event()  # all of it is written
        self._ready_bytes = self._moved_bytes = 0  # as the KV is in a cache, whatever the codec
        self.stats = PullStats(held_tokens=held_tokens)

    @property
    def codec(self) -> common_pb2.KvCodec:
        """In which the KV travels."""
        return self._spec.codec

    async def run(self, timeout: float | None, on_first_token: Callable[[FirstTokenArrived], None]) -> None:
        """Runs the prefill RPC and the data streams; returns when every range is in place and acknowledged.

        A worker that freezes when it has given all is waited for no longer than ``_FAREWELL``.

        Args:
            timeout: seconds left of the request's deadline.
            on_first_token: called on the event loop, before the KV is complete.
        """
        self._outgoing.put_nowait(self._start_message())
        control = self._peer.control.Prefill(timeout=timeout, metadata=tracing.outgoing())
        try:
            async with asyncio.timeout(None) as self._farewell, asyncio.TaskGroup() as group:
                sending = group.create_task(self._send(control))
                watch = group.create_task(self._watch())
                queue_ns = 0
                async for message in responses(control, self._worker):
                    match message.WhichOneof("message"):
                        case "queued":
                            # Only now does the worker know the transfer by its id.
                            for channel, ranges in zip(self._peer.data, self._shares(), strict=False):
                                group.create_task(self._pull(channel, ranges, timeout))
                        case "scheduled":
                            queue_ns = message.scheduled.queue_ns
                            self.stats.cached_tokens = message.scheduled.cached_tokens
                            self._note_ready(0, message.scheduled.cached_tokens)
                        case "first_token":
                            now = time.monotonic_ns()
                            self.stats.first_token_ns = now - self.stats.started_ns
                            on_first_token(FirstTokenArrived(message.first_token, queue_ns, now))
                            self._look_for_the_end()
                        case "ready":
                            self._note_ready(message.ready.token_start, message.ready.token_end)
                        case "done":
                            self.stats.prefill = message.done.trace
                watch.cancel()
                sending.cancel()
        except TimeoutError:
            logger.warning("%s has not ended a transfer of which it has given all", self._worker)
        except BaseExceptionGroup as errors:
            lost_peer = errors.split((Unavailable, RequestCancelled))[1] is None
            if not self._has_all or not lost_peer:
                raise _cause(errors) from errors
            # All that was asked for is in place; a worker that leaves now does no harm.
        finally:
            # TaskGroup has joined its tasks; the worker frees its side when the RPC ends.
            control.cancel()
        if self._unwritten:
            raise TransferFailed(f"prefill ended with {self._unwritten} KV cells missing")

    async def _watch(self) -> None:
        ready, moved = (lambda: self._ready_bytes), (lambda: self._moved_bytes)
        await watch_transfer(self._worker, self._spec.total_bytes, self._limits, ready, moved)

    @property
    def _has_all(self) -> bool:
        """Whether the prefill worker has nothing more that is wanted."""
        return not self._unwritten and (self.stats.first_token_ns > 0 or not self._request.sample_first_token)

    def _look_for_the_end(self) -> None:
        if self._has_all:
            self._farewell.reschedule(asyncio.get_running_loop().time() + _FAREWELL)

    def _note_ready(self, token_start: int, token_end: int) -> None:
        tokens = max(0, token_end - max(token_start, self._spec.tokens[0]))
        self._ready_bytes += tokens * len(self._spec.layers) * self._spec.kv.token_layer_bytes

    def _start_message(self) -> prefill_pb2.PrefillRequest:
        request = self._request
        return prefill_pb2.PrefillRequest(
            start=prefill_pb2.StartPrefill(
                request_id=request.request_id,
                attempt=request.attempt,
                transfer_id=self._spec.transfer_id,
                prompt_token_ids=request.prompt_token_ids,
                sampling=request.sampling,
                sample_first_token=request.sample_first_token,
                layers=self._spec.layers,
                already_held_tokens=self._spec.tokens[0],
                codec=self._spec.codec,
                expected_incarnation=self._peer.target.incarnation,
                cache_namespace=request.cache_namespace,
                trace=request.trace,
                sample_index=request.sample_index,
            )
        )

    async def _send(self, control: Any) -> None:
        # Not as an iterator of requests: gRPC would wait for the next one in a task that outlives the call.
        with suppress(OverfillError):  # the call has ended; reading it tells how
            while True:
                message = await self._outgoing.get()
                if message.HasField("ack"):
                    with suppress(TimeoutError):
                        await asyncio.wait_for(self._whole.wait(), _ACK_DELAY)
                while message.HasField("ack") and not self._outgoing.empty():  # only acknowledgements follow the start
                    message.ack.ranges.extend(self._outgoing.get_nowait().ack.ranges)
                await checked_write(control.write(message), self._worker)

    def _shares(self) -> list[list[KvRange]]:
        return share_out(self._spec.layers, self._spec.tokens, self._spec.kv.num_kv_heads, len(self._peer.data))

    async def _pull(self, channel: grpc.aio.Channel, ranges: list[KvRange], timeout: float | None) -> None:
        """Pulls ``ranges``. What a wrong chunk or a broken stream leaves out is asked for again: it is computed."""
        for repeats in itertools.count():
            error: OverfillError | None = None
            # What shared memory did not bring travels.
            link = self._peer.link if repeats == 0 and self._peer.link is not None and self._peer.link.alive else None
            try:
                await self._pull_once(channel, ranges, timeout, link)
            except _REPEATABLE as failure:
                error = failure
            ranges = self._coverage.missing(ranges)
            if ranges and error is None:
                error = TransferFailed(f"{self._worker} left out {ranges[0]}")
            if error is None:
                return
            self.stats.broken_streams += 1
            logger.warning("%s: a data stream broke with %d ranges missing: %s", self._worker, len(ranges), error)
            if not ranges:
                return
            if repeats == MAX_REPEATS:
                raise error
            await asyncio.sleep(_REPEAT_DELAY * 2**repeats)

    async def _pull_once(
        self, channel: grpc.aio.Channel, ranges: list[KvRange], timeout: float | None, link: ShmClient | None
    ) -> None:
        loop = asyncio.get_running_loop()
        stream = link.new_stream() if link is not None else 0
        request = prefill_pb2.PullKvRequest(
            transfer_id=self._spec.transfer_id,
            attempt=self._spec.attempt,
            ranges=[box.to_proto() for box in ranges],
            link_id=link.id if link is not None else b"",
            stream=stream,
        )
        call = pull_kv(channel, request, timeout)
        try:
            async for message in responses(call, self._worker):
                taken: list[_Taken] = []  # also when a later chunk of the message is wrong
                try:
                    await shielded(loop.run_in_executor(self._executor, self._take_all, message, link, taken))
                finally:
                    if link is not None:
                        link.give_back([one.slot for one in taken if one.slot is not None])
                    self._note_taken(taken)
        except InvalidRequest as error:  # of the ranges, which are ours and not the user's
            raise TransferFailed(f"{self._worker} refused the ranges: {error}") from error
        finally:
            call.cancel()
            if link is not None:
                link.end_stream(stream)

    def _take_all(self, message: bytes, link: ShmClient | None, taken: list[_Taken]) -> None:
        """Writes the chunks of a message that are right; ``taken`` tells which, also when a later one is wrong."""
        found: list[tuple[Piece, _Taken]] = []
        try:
            for chunk in decode_all(message):
                found.append(self._claim(chunk, link))
        finally:
            pieces = [piece for piece, _ in found]
            whole = write_chunks(self._cache, self._blocks, self._rows, pieces)
            taken += [one for _, one in found[:whole]]
            for piece in pieces[whole:]:
                self._coverage.remove(piece.box)
        if whole < len(pieces):
            raise wrong_checksum(pieces[whole].box)

    def _claim(self, chunk: WireChunk, link: ShmClient | None) -> tuple[Piece, _Taken]:
        """What is to be written of a chunk, its cells marked as there: nobody else may write to them."""
        slot = None
        if chunk.head.HasField("shared"):
            if link is None:
                raise TransferFailed(f"{self._worker} put a payload into memory that is not shared")
            slot = chunk.head.shared.slot
            chunk.payload = link.payload(chunk.head.shared)
        spec, codec = self._spec.kv, self._spec.codec
        if codec == common_pb2.KV_CODEC_RAW:
            piece = check_head(self._spec, chunk)
        elif codec == self._cache.codec:
            piece = Piece(check(self._spec, chunk), chunk.payload, scales=chunk.scales)
            check_scales(piece.scales)
        else:
            box = check(self._spec, chunk)
            piece = Piece(box, decode(codec, spec.dtype, spec.head_dim, chunk.scales, chunk.payload))
        self._coverage.add(piece.box)
        return piece, _Taken(piece.box, len(chunk.payload) + len(chunk.scales), slot)

    def _note_taken(self, taken: Sequence[_Taken]) -> None:
        if not taken:
            return
        now = time.monotonic_ns() - self.stats.started_ns
        self.stats.first_kv_ns = self.stats.first_kv_ns or now
        self.stats.last_kv_ns = now
        self.stats.kv_chunks += len(taken)
        for one in taken:
            self._unwritten -= one.box.cells
            self.stats.kv_bytes += one.size
            self._moved_bytes += self._spec.cache_bytes(one.box)
            self.stats.shared_bytes += one.size if one.slot is not None else 0
        if not self._unwritten:
            self._whole.set()
            self._look_for_the_end()
        ack = prefill_pb2.AckKv(ranges=[one.box.to_proto() for one in taken])
        self._outgoing.put_nowait(prefill_pb2.PrefillRequest(ack=ack))


@dataclass(frozen=True, slots=True)
class _Taken:
    """A chunk that is in place: what it covers, bytes of payload, and the slot they were in."""

    box: KvRange
    size: int
    slot: int | None


def _cause(errors: BaseExceptionGroup[BaseException]) -> BaseException:
    """The error that broke a transfer: our own finding first, a stream that was merely cancelled last."""
    found = [*errors.exceptions]
    found.sort(key=lambda error: (isinstance(error, RequestCancelled), not isinstance(error, TransferFailed)))
    return found[0]

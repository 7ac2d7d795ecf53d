"""The receiving half of a handoff: has a prefill worker compute a prompt, and its KV moved into blocks here.

``PromptPull`` transfers one prompt over a ``PrefillPeer``. It holds the control stream and the books, and a ``Puller``
moves the KV. It handles token ids only; sampling and scheduling are the engine's.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import secrets
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Protocol

from overfill.errors import InvalidRequest, OverfillError, RequestCancelled, TransferFailed, Unavailable
from overfill.kv.chunks import TRANSFER_ID_BYTES, TransferSpec
from overfill.kv.peers import PrefillPeer
from overfill.kv.puller import MAX_REPEATS, LocalPuller
from overfill.kv.ranks import Moved, Pull, Puller, root_cause
from overfill.kv.spec import KvSpec
from overfill.kv.stall import DEFAULT_LIMITS, TransferLimits, watch_transfer
from overfill.rpc.calls import checked_response, checked_write, responses
from overfill.rpc.constants import MAX_KV_AT_ONCE
from overfill.rpc.worker import shared_tokens
from overfill.telemetry import tracing
from overfill.v1 import common_pb2, decode_pb2, kv_pb2, prefill_pb2

_MAX_ENCODED_AT_ONCE = 2 * MAX_KV_AT_ONCE
"""Limit on the bytes of KV in an answer of PrefillAtOnce: KV, scales, and the heads of its chunks."""

_ACK_DELAY = 0.01  # seconds in which acknowledgements are collected into one message; the last ones leave at once
_FAREWELL = 1.0  # seconds for the prefill worker to end its RPC after the decode worker has received everything

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class PullStats:
    """Measurements of one handoff. Times are nanoseconds since the request was sent."""

    started_ns: int = field(default_factory=time.monotonic_ns)
    first_token_ns: int = 0
    first_kv_ns: int = 0
    last_kv_ns: int = 0
    kv_bytes: int = 0
    kv_chunks: int = 0
    shared_bytes: int = 0  # part of kv_bytes that came through shared memory
    cached_tokens: int | None = None  # of the prompt, not computed; None until the prefill has begun
    peer_tokens: int = 0  # part of cached_tokens that came from another worker
    disk_tokens: int = 0  # part of cached_tokens that came from disk
    held_tokens: int = 0  # of the prompt, in this worker's blocks before the transfer
    broken_streams: int = 0  # data streams that ended with a wrong chunk, missing ranges or an error
    prefill: kv_pb2.PrefillTrace | None = None

    def note_scheduled(self, scheduled: prefill_pb2.PrefillScheduled) -> None:
        """Keeps what was not computed of the prompt. Each part is cut to the whole: a worker may report any number."""
        self.cached_tokens = scheduled.cached_tokens
        self.peer_tokens = min(scheduled.peer_tokens, scheduled.cached_tokens)
        self.disk_tokens = min(scheduled.disk_tokens, scheduled.cached_tokens - self.peer_tokens)

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
            peer_tokens=self.peer_tokens,
            disk_tokens=self.disk_tokens,
            held_tokens=self.held_tokens,
            shared_bytes=self.shared_bytes,
        )


class Handoff(Protocol):
    """The prefill of one prompt into a sequence's blocks: on another worker, or on this one.

    Attributes:
        codec: codec in which the KV travels; unspecified if it stays in this process.
        stats: measurements.
    """

    @property
    def codec(self) -> common_pb2.KvCodec: ...

    @property
    def stats(self) -> PullStats: ...

    async def run(
        self,
        timeout: float | None,
        on_first_token: Callable[[decode_pb2.Tokens], None],
        on_in_place: Callable[[], None],
    ) -> None:
        """Returns when the prompt's KV is in place; see ``PromptPull.run``. Raises OverfillError."""
        ...

    def release(self) -> bool:
        """Ends ``run`` early, after the first token: the rest of the KV is not needed.

        Returns:
            False if ``run`` has ended, or must be cancelled instead.
        """
        ...


class PromptPull:
    """Transfers one prompt's KV from a prefill worker into ``blocks``.

    ``run`` ends, also by an error or a cancellation, only after every task and thread that may touch the blocks.

    Args:
        start: the request. The pull sets the fields that describe the transfer. ``codec`` is a wish: KV travels raw if
            the prefill worker does not offer it.
        kv: geometry of the full model's KV.
        layer_map: ``layer_map[i]`` is the full-model layer whose KV is stored in cache layer i.
        puller: moves the KV.
        vocab_size: number of token ids; the first token's is below.
        held_tokens: leading prompt tokens whose KV is in ``blocks`` already.
        limits: time limits of the transfer.

    Raises (from ``run``):
        TransferFailed: a chunk was wrong, a range is missing, or ``limits`` are exceeded.
        Unavailable, Overloaded, DeadlineExceeded, ...: the prefill worker's answer.
    """

    def __init__(
        self,
        peer: PrefillPeer,
        start: prefill_pb2.StartPrefill,
        kv: KvSpec,
        layer_map: Sequence[int],
        puller: Puller,
        blocks: Sequence[int],
        vocab_size: int,
        held_tokens: int = 0,
        limits: TransferLimits = DEFAULT_LIMITS,
    ) -> None:
        layers = tuple(sorted(set(layer_map)))
        self._peer = peer
        self._worker = f"prefill worker {peer.target.worker_id}"
        self._sample_first_token = start.sample_first_token
        # With an answer_start, the prompt's times and scores come where the first token would.
        self._awaits_first = start.sample_first_token or start.HasField("answer_start")
        self._puller = puller
        self._layer_map = layer_map
        self._blocks = blocks
        self._vocab_size = vocab_size
        self._limits = limits
        self._spec = TransferSpec(
            secrets.token_bytes(TRANSFER_ID_BYTES),
            start.attempt,
            kv,
            layers,
            (held_tokens, shared_tokens(start)),
            start.codec if start.codec in peer.codecs else common_pb2.KV_CODEC_RAW,
        )
        self._vector_bytes = kv.token_layer_bytes // (2 * kv.num_kv_heads)
        self._start = prefill_pb2.PrefillRequest(start=start)
        start = self._start.start
        start.transfer_id = self._spec.transfer_id
        start.layers[:] = layers
        start.already_held_tokens = held_tokens
        start.codec = self._spec.codec
        start.expected_incarnation = peer.target.incarnation
        self._expect_all()
        self._outgoing: asyncio.Queue[prefill_pb2.PrefillRequest] = asyncio.Queue()
        self._farewell = asyncio.timeout(None)
        self._on_in_place: Callable[[], None] = lambda: None
        self._whole = asyncio.Event()  # set when all KV is written
        self._pulling: asyncio.Task[None] | None = None
        self._ended = False
        # An answer of one token needs no KV.
        self._released = start.sample_first_token and start.sampling.max_tokens == 1
        self._ready_bytes = self._moved_bytes = 0  # bytes of KV before encoding
        self._queue_ns = 0
        self.stats = PullStats(held_tokens=held_tokens)

    @property
    def codec(self) -> common_pb2.KvCodec:
        """Codec in which the KV travels."""
        return self._spec.codec

    async def run(
        self,
        timeout: float | None,
        on_first_token: Callable[[decode_pb2.Tokens], None],
        on_in_place: Callable[[], None] = lambda: None,
    ) -> None:
        """Runs the prefill RPC and the data streams, or one RPC for little or no KV. Returns when all KV is in place.

        If the worker freezes after it has sent everything, or after ``release``, returns after ``_FAREWELL``.

        Args:
            timeout: seconds left of the request's deadline.
            on_first_token: called on the event loop, usually before the KV is complete. The token has the times of
                queue and prefill; its arrival is in ``stats``.
            on_in_place: called once on the event loop when all KV is written and the first token is known. Nothing
                writes to the blocks any more. ``run`` returns later, because the worker's last word crosses the link.
        """
        self._on_in_place = on_in_place
        little = self._spec.total_bytes <= MAX_KV_AT_ONCE
        if self._released or (little and self._peer.has_kv and isinstance(self._puller, LocalPuller)):
            await self._run_at_once(timeout, on_first_token)
            return
        self._outgoing.put_nowait(self._start)
        control = self._peer.control.Prefill(timeout=timeout, metadata=tracing.outgoing())
        try:
            async with asyncio.timeout(None) as self._farewell, asyncio.TaskGroup() as group:
                sending = group.create_task(self._send(control))
                watch = group.create_task(self._watch())
                async for message in responses(control, self._worker):
                    if message.HasField("scheduled") and not self._released and self._pulling is None:
                        # The worker has blocks now, and knows the transfer's id, so that PullKv can name it.
                        self._pulling = group.create_task(self._puller.pull(self._new_pull(timeout), self._note_moved))
                    self._note_response(message, on_first_token)
                    if message.HasField("first_token"):
                        self._check_in_place()
                watch.cancel()
                sending.cancel()
        except TimeoutError:
            logger.warning("%s did not end the transfer within %g s of its last KV", self._worker, _FAREWELL)
        except BaseExceptionGroup as errors:
            lost_peer = errors.split((Unavailable, RequestCancelled))[1] is None
            if not self._has_all or not lost_peer:
                raise _not_the_users(root_cause(errors)) from errors
            # Everything is in place; it does not matter that the worker has gone.
        finally:
            self._ended = True
            # TaskGroup has joined its tasks. The worker frees the KV when the RPC ends.
            control.cancel()
        self._check_all()

    async def _run_at_once(self, timeout: float | None, on_first_token: Callable[[decode_pb2.Tokens], None]) -> None:
        """Runs the transfer as one RPC, and as another one when its KV was damaged."""
        self._ended = True  # nothing can be released: the worker has released all when its answer arrives
        request = self._start.start
        request.without_kv = self._released
        deadline = None if timeout is None else time.monotonic() + timeout
        for repeats in itertools.count():
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            call = self._peer.control.PrefillAtOnce(request, timeout=left, metadata=tracing.outgoing())
            try:
                message: prefill_pb2.PrefillResponse = await checked_response(call, self._worker)
            except InvalidRequest as error:
                raise _not_the_users(error) from error
            if len(message.kv) > _MAX_ENCODED_AT_ONCE:
                raise TransferFailed(f"{self._worker} sent {len(message.kv)} bytes; at most {_MAX_ENCODED_AT_ONCE} fit")
            if not repeats:  # a repeat finds in the prefix cache what the first call computed, and has only KV to give
                self._note_response(message, on_first_token)
                # Two turns of the loop send the first token. Then a thread that writes KV takes the interpreter's lock.
                await asyncio.sleep(0)
                await asyncio.sleep(0)
            try:
                if message.kv and isinstance(self._puller, LocalPuller):
                    await self._puller.take(self._new_pull(timeout), message.kv, self._note_moved)
                self._check_all()
            except TransferFailed as error:
                if repeats == MAX_REPEATS or not self._has_first_token:
                    raise
                self.stats.broken_streams += 1
                logger.warning("%s: an answer broke: %s", self._worker, error)
                request.sample_first_token = False
                request.sampling.ClearField("prompt_logprobs")
                self._expect_all()
            else:
                break
        if not self._released:
            self._on_in_place()

    def _note_response(
        self, message: prefill_pb2.PrefillResponse, on_first_token: Callable[[decode_pb2.Tokens], None]
    ) -> None:
        if message.HasField("scheduled"):
            self._queue_ns = message.scheduled.queue_ns
            self.stats.note_scheduled(message.scheduled)
            self._note_ready(0, message.scheduled.cached_tokens)
        if message.HasField("ready"):
            self._note_ready(message.ready.token_start, message.ready.token_end)
        if message.HasField("first_token"):
            first = message.first_token
            if len(first.ids) != self._sample_first_token or first.first_index:
                raise TransferFailed(
                    f"{self._worker} sent {len(first.ids)} tokens from index {first.first_index}; "
                    "a prefill worker sends one, the first, if it is asked to"
                )
            if first.ids and first.ids[0] >= self._vocab_size:
                raise TransferFailed(f"{self._worker} sent the token {first.ids[0]} of {self._vocab_size}")
            if len(first.logprobs) != len(first.ids) * self._start.start.sampling.HasField("logprobs"):
                raise TransferFailed(f"{self._worker} sent {len(first.logprobs)} log-probabilities of the first token")
            elapsed = self.stats.first_token_ns = time.monotonic_ns() - self.stats.started_ns
            # The prefill worker may report any number: each part is cut to the time that passed here.
            first.prefill_queue_ns = min(self._queue_ns, elapsed)
            first.prefill_compute_ns = min(first.prefill_compute_ns, elapsed)
            first.return_ns = min(first.return_ns, elapsed)
            on_first_token(first)
        if message.HasField("done"):
            self.stats.prefill = message.done.trace

    def _expect_all(self) -> None:
        """Takes all KV for missing."""
        self._unwritten = self._spec.total_bytes // self._vector_bytes  # key and value vectors

    def _check_all(self) -> None:
        """Raises TransferFailed unless everything has arrived."""
        if self._unwritten and not self._released:
            raise TransferFailed(f"prefill ended with {self._unwritten} key and value vectors missing")
        if not self._has_all:
            raise TransferFailed("prefill ended without the first token")

    def release(self) -> bool:
        """Ends ``run`` early, after the first token: stops the data streams and tells the worker, which frees the KV.

        Returns:
            False if ``run`` has ended, or must be cancelled instead.
        """
        if self._ended:
            return False
        if not self._has_all:
            self._released = True
            if self._pulling is not None:
                self._pulling.cancel()
            self._outgoing.put_nowait(_release())
            self._check_in_place()
        return True

    async def _watch(self) -> None:
        ready, moved = (lambda: 0 if self._released else self._ready_bytes), (lambda: self._moved_bytes)
        await watch_transfer(self._worker, self._spec.total_bytes, self._limits, ready, moved)

    @property
    def _has_all(self) -> bool:
        """Whether all KV, unless it is released, and the first token, if requested, have arrived."""
        return self._has_first_token and (self._released or not self._unwritten)

    @property
    def _has_first_token(self) -> bool:
        return self.stats.first_token_ns > 0 or not self._awaits_first

    def _check_in_place(self) -> None:
        if self._has_all:
            self._farewell.reschedule(asyncio.get_running_loop().time() + _FAREWELL)
            if not self._released:
                self._on_in_place()

    def _note_ready(self, token_start: int, token_end: int) -> None:
        tokens = max(0, token_end - max(token_start, self._spec.tokens[0]))
        self._ready_bytes += tokens * len(self._spec.layers) * self._spec.kv.token_layer_bytes

    async def _send(self, control: Any) -> None:
        # Not as an iterator of requests: gRPC would wait for the next request in a task that outlives the call.
        with suppress(OverfillError):  # the call has ended; the reader of its responses raises the reason
            while True:
                message = await self._outgoing.get()
                if message.HasField("ack") and not self._whole.is_set():
                    with suppress(TimeoutError):
                        await asyncio.wait_for(self._whole.wait(), _ACK_DELAY)
                while message.HasField("ack") and not self._outgoing.empty():
                    later = self._outgoing.get_nowait()
                    if later.HasField("release"):  # acknowledgements are superfluous
                        message = later
                    else:
                        message.ack.ranges.extend(later.ack.ranges)
                await checked_write(control.write(message), self._worker)

    def _new_pull(self, timeout: float | None) -> Pull:
        return Pull(self._worker, self._spec, self._layer_map, self._blocks, self._peer.sources, timeout)

    def _note_moved(self, moved: Moved) -> None:
        """Counts what a pull reports, and acknowledges what is in place, unless the KV is released."""
        stats = self.stats
        stats.broken_streams += moved.broken_streams
        stats.kv_chunks += moved.chunks
        stats.kv_bytes += moved.kv_bytes
        stats.shared_bytes += moved.shared_bytes
        if not moved.ranges:
            return
        stats.last_kv_ns = time.monotonic_ns() - stats.started_ns
        stats.first_kv_ns = stats.first_kv_ns or stats.last_kv_ns
        num_vectors = sum(kv_range.num_vectors for kv_range in moved.ranges)
        self._unwritten -= num_vectors
        self._moved_bytes += num_vectors * self._vector_bytes
        if self._ended:  # PrefillAtOnce is not acknowledged
            return
        if not self._unwritten:
            self._whole.set()
            self._check_in_place()
        if not self._released:  # a release is the last message
            ack = prefill_pb2.AckKv(ranges=[kv_range.to_proto() for kv_range in moved.ranges])
            self._outgoing.put_nowait(prefill_pb2.PrefillRequest(ack=ack))


def _release() -> prefill_pb2.PrefillRequest:
    return prefill_pb2.PrefillRequest(release=prefill_pb2.ReleaseKv())


def _not_the_users(error: BaseException) -> BaseException:
    """Returns TransferFailed for a refusal that names no field of the request: another worker may accept it."""
    return TransferFailed(str(error)) if isinstance(error, InvalidRequest) and not error.field else error

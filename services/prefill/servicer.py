"""The Prefill service: each RPC is a lease on the KV of one prompt. Token ids only; no text, no routing."""

from __future__ import annotations

import asyncio
import logging
import sys
import time
from collections.abc import AsyncIterator, Coroutine, Sequence
from concurrent.futures import Executor
from contextlib import aclosing, asynccontextmanager
from typing import assert_never

from overfill.engine.protocol import ServedHalf
from overfill.engine.sequence import (
    AwaitingImport,
    ChunkComputed,
    KvWritten,
    LayerStarted,
    Lent,
    PrefillEvent,
    PrefillScheduled,
    PrefillSequence,
    PromptComputed,
    Release,
    SequenceFailed,
    Submit,
)
from overfill.errors import (
    Incompatible,
    InvalidRequest,
    OverfillError,
    Overloaded,
    PromptTooLong,
    Unavailable,
)
from overfill.kv.chunks import TRANSFER_ID_BYTES, TransferSpec
from overfill.kv.ranges import KvRange
from overfill.kv.sender import KvSender
from overfill.kv.shm import ShmServer
from overfill.kv.stall import DEFAULT_LIMITS, TransferLimits, watch_transfer
from overfill.kv.streams import TransferStreams, unknown_transfer
from overfill.request.params import SamplingParams, check_token_ids
from overfill.rpc.constants import MAX_KV_AT_ONCE
from overfill.rpc.interceptors import Context
from overfill.rpc.worker import WorkerHost, check_start, fill_description, shared_tokens
from overfill.telemetry import logs, tracing
from overfill.telemetry.metrics import PrefillMetrics
from overfill.telemetry.outcomes import outcome_of
from overfill.v1 import kv_pb2, prefill_pb2, prefill_pb2_grpc, registry_pb2
from services.hosting import EnginePort
from services.messages import first_token_to_proto
from services.prompt_hasher import PromptHasher

logger = logging.getLogger(__name__)


class Lease:
    """One prompt from acceptance to release: its sequence, the sender of its KV, and the streams that read it."""

    def __init__(
        self, start: prefill_pb2.StartPrefill, sequence: PrefillSequence, served: ServedHalf, executor: Executor
    ) -> None:
        self.spec = TransferSpec(
            start.transfer_id,
            start.attempt,
            served.kv,
            tuple(start.layers),
            (start.already_held_tokens, len(sequence.prompt)),
            start.codec,
        )
        self.sequence = sequence
        self.received_ns = time.monotonic_ns()
        # Queue of the RPC: engine events, an error that ends the RPC, or None to check for the end again.
        self.events: asyncio.Queue[PrefillEvent | Exception | None] = asyncio.Queue()
        self.sender = KvSender(self.spec, served.store, executor)
        self.streams = TransferStreams(self.sender)
        self.ranks = served.ranks
        self.released = False  # True once the decode worker needs no more KV
        self.scheduled_ns = 0
        self.tells_times = start.HasField("answer_start")  # the decoder samples the first token
        self.trace = kv_pb2.PrefillTrace()

    def on_event(self, event: PrefillEvent) -> None:
        """Handles an engine event. Call it on the event loop."""
        match event:
            case PrefillScheduled(blocks=blocks, cached_tokens=cached, event=mark, time_ns=now):
                self.scheduled_ns = now
                self.sender.begin(blocks, cached, mark)
            case LayerStarted(layer=layer, time_ns=now):
                if layer == 0:
                    del self.trace.layer_start_ns[:]
                    del self.trace.layer_end_ns[:]
                else:
                    self.trace.layer_end_ns.append(now - self.scheduled_ns)
                self.trace.layer_start_ns.append(now - self.scheduled_ns)
                return
            case KvWritten(layers=layers, token_end=end, event=mark):
                for layer in layers:
                    self.sender.mark_ready(layer, end, mark)
                return
            case PromptComputed(time_ns=now):
                if self.trace.layer_start_ns:  # the engine reports layers
                    self.trace.layer_end_ns.append(now - self.scheduled_ns)
            case AwaitingImport() | Lent() | ChunkComputed() | SequenceFailed():
                pass
            case _:
                assert_never(event)
        self.events.put_nowait(event)

    async def guard(self, work: Coroutine[object, object, None]) -> None:
        """Runs ``work`` beside the RPC. Its end wakes the RPC; its failure ends the RPC."""
        try:
            await work
        except Exception as error:
            self.events.put_nowait(error)
        else:
            self.events.put_nowait(None)

    async def watch_transfer(self, limits: TransferLimits) -> None:
        """Raises TransferFailed when the decode worker stops acknowledging KV although some is ready."""
        sender = self.sender
        ready, moved = (lambda: 0 if self.released else sender.ready_bytes), (lambda: sender.acknowledged_bytes)
        await watch_transfer("the decode worker", self.spec.total_bytes, limits, ready, moved)

    async def begin_streams(self, event: PrefillScheduled) -> None:
        """Has the ranks that hold the KV serve it; without ranks, this process serves it already."""
        if self.ranks is not None:
            await self.ranks.open(self.spec, event.blocks, event.cached_tokens)

    async def join_streams(self) -> None:
        """Ends every stream that reads the blocks, here and in ranks, and waits until all have ended."""
        await self.streams.join()
        if self.ranks is not None:
            first, last = await self.ranks.close(self.spec.transfer_id)
            self.sender.first_sent_ns, self.sender.last_sent_ns = first or None, last or None

    def finished_trace(self) -> kv_pb2.PrefillTrace:
        now = time.monotonic_ns()
        self.trace.first_kv_sent_ns = (self.sender.first_sent_ns or now) - self.scheduled_ns
        self.trace.last_kv_sent_ns = (self.sender.last_sent_ns or now) - self.scheduled_ns
        self.trace.last_ack_ns = now - self.scheduled_ns
        return self.trace


class PrefillServicer(prefill_pb2_grpc.PrefillServicer):
    """Serves the RPCs of a prefill worker. The process sets ``engine`` and ``host`` before the server starts.

    Args:
        executor: threads that copy KV out of the cache.
        max_leases: maximum number of prompts at once, waiting ones included.
        shm_server: shares memory with decode workers on this host.
    """

    engine: EnginePort
    host: WorkerHost

    def __init__(
        self,
        served: ServedHalf,
        hello: registry_pb2.Hello,
        executor: Executor,
        max_leases: int,
        shm_server: ShmServer | None = None,
        metrics: PrefillMetrics | None = None,
        limits: TransferLimits = DEFAULT_LIMITS,
    ) -> None:
        self._metrics = metrics or PrefillMetrics()
        self._limits = limits
        self._half = served
        self._hasher = PromptHasher(served.blocks_of)
        self._shm_server = shm_server or ShmServer(enabled=False)
        self._max_leases = max_leases
        self._hello = hello
        self._executor = executor
        self._leases: dict[str, Lease] = {}  # by the id of the sequence, the transfer's in hexadecimal digits
        self._releases: set[asyncio.Task[None]] = set()

    @property
    def active(self) -> int:
        return len(self._leases)

    def end_all(self, error: OverfillError) -> None:
        """Ends every lease with ``error``; the decode workers then ask for another prefill worker."""
        for lease in self._leases.values():
            lease.events.put_nowait(error)

    def on_events(self, events: Sequence[PrefillEvent]) -> None:
        """Passes engine events to their leases. Call it on the event loop."""
        for event in events:
            if lease := self._leases.get(event.id):
                lease.on_event(event)

    async def Describe(
        self, request: prefill_pb2.DescribePrefillRequest, context: Context
    ) -> prefill_pb2.DescribePrefillResponse:
        description = prefill_pb2.DescribePrefillResponse(codecs=self._half.codecs, shm=self._shm_server.offer)
        return fill_description(description, self._hello)

    async def Prefill(
        self,
        request_iterator: AsyncIterator[prefill_pb2.PrefillRequest],
        context: Context,
    ) -> AsyncIterator[prefill_pb2.PrefillResponse]:
        with self._metrics.prompt():
            first = await anext(aiter(request_iterator), None)
            if first is None or first.WhichOneof("message") != "start":
                raise InvalidRequest("start", "the first message of Prefill is StartPrefill")
            async with self._lease(first.start) as lease:
                guards = [
                    asyncio.ensure_future(lease.guard(self._read_acknowledgements(lease, request_iterator))),
                    asyncio.ensure_future(lease.guard(lease.watch_transfer(self._limits))),
                ]
                try:
                    async for response in self._serve(lease, first.start.trace):
                        yield response
                finally:
                    for guard in guards:
                        guard.cancel()

    async def PrefillAtOnce(self, request: prefill_pb2.StartPrefill, context: Context) -> prefill_pb2.PrefillResponse:
        with self._metrics.prompt():
            if not request.without_kv:
                self._check_has_kv("PrefillAtOnce with KV")
            async with self._lease(request) as lease:
                if not request.without_kv and lease.spec.total_bytes > MAX_KV_AT_ONCE:
                    left = f"leaves {lease.spec.total_bytes} bytes of KV; PrefillAtOnce sends at most {MAX_KV_AT_ONCE}"
                    raise InvalidRequest("already_held_tokens", left)
                response, computed = prefill_pb2.PrefillResponse(), False
                while not computed:
                    event = await lease.events.get()
                    if isinstance(event, Exception):
                        raise event
                    if event is not None:
                        self._note(lease, event, response)
                    computed = isinstance(event, PromptComputed)
                if not request.without_kv:
                    response.kv = await lease.sender.whole_message()
                if request.trace:
                    response.done.trace.CopyFrom(lease.finished_trace())
                    response.done.trace.first_token_sent_ns = response.done.trace.last_kv_sent_ns  # in one message
                return response

    @asynccontextmanager
    async def _lease(self, start: prefill_pb2.StartPrefill) -> AsyncIterator[Lease]:
        """Accepts a prompt, and ends its lease at the end of the context."""
        logs.request_id.set(start.request_id)
        tracing.current().set(
            request_id=start.request_id, worker=self._hello.worker_id, prompt_tokens=len(start.prompt_token_ids)
        )
        self._check_open(start)
        lease = self._accept(start, await self._parse(start))
        try:
            yield lease
        finally:
            self._end(lease)
            logs.ended("prefill", outcome_of(sys.exception()), prompt_tokens=len(lease.sequence.prompt))

    async def PullKv(self, request: prefill_pb2.PullKvRequest, context: Context) -> AsyncIterator[bytes]:
        """Yields encoded ``KvChunk``s."""
        self._check_has_kv("PullKv")
        if (lease := self._leases.get(request.transfer_id.hex())) is None:
            raise unknown_transfer()
        async with aclosing(lease.streams.serve(request, self._shm_server)) as messages:
            async for message in messages:
                yield message

    async def _parse(self, start: prefill_pb2.StartPrefill) -> PrefillSequence:
        """Returns the prompt that ``start`` asks for, as the engine takes it.

        Raises:
            InvalidRequest, Incompatible: a field is out of range, or the first token's grammar is not supported.
        """
        sampling = SamplingParams.from_proto(start.sampling)
        _check_start(start, sampling, self._half)
        tokens, shared = list(start.prompt_token_ids), shared_tokens(start)
        prompt, rest = tokens[:shared], tokens[shared:]
        processor = None
        if start.sample_first_token:
            eos_ids = self._half.config.eos_token_ids
            processor = await self._half.prepare_processor(sampling, prompt, eos_ids, start.cache_namespace)
        return PrefillSequence(
            id=start.transfer_id.hex(),
            prompt=prompt,
            sampling=sampling,
            sample_index=start.sample_index,
            sample_first_token=start.sample_first_token,
            processor=processor,
            cache_namespace=start.cache_namespace,
            prompt_blocks=await self._hasher.blocks_of(prompt, start.cache_namespace),
            trace=start.trace,
            scores=self._half.new_scores(sampling),
            follower=rest[0] if rest else None,
        )

    def _accept(self, start: prefill_pb2.StartPrefill, sequence: PrefillSequence) -> Lease:
        """Registers a lease and submits its prompt. Raises if it cannot be accepted now."""
        self._check_open(start)  # again: compiling a grammar takes time
        if sequence.id in self._leases:
            raise InvalidRequest("transfer_id", "is in use by a running transfer")
        lease = self._leases[sequence.id] = Lease(start, sequence, self._half, self._executor)
        self.engine.send(Submit(sequence))
        return lease

    def _check_open(self, start: prefill_pb2.StartPrefill) -> None:
        """Raises unless the worker accepts new prompts and is the incarnation that the router means."""
        check_start(start, self._hello, draining=self.host.draining)
        if len(self._leases) >= self._max_leases:
            raise Overloaded(f"{self._hello.worker_id} has {len(self._leases)} prompts, which is its maximum")

    def _check_has_kv(self, rpc: str) -> None:
        """Raises Incompatible if this process has no KV."""
        if self._half.ranks is not None:
            raise Incompatible(f"{rpc}: the ranks of {self._hello.worker_id} have its KV", ["data_addresses"])

    def _end(self, lease: Lease) -> None:
        """Ends the lease. The engine stops at once; the blocks return to the pool after the last reader has ended."""
        lease.sequence.cancelled = True
        # A task of its own: the RPC's task may be cancelled again while the readers are being joined.
        task = asyncio.ensure_future(self._release(lease))
        self._releases.add(task)
        task.add_done_callback(self._releases.discard)

    async def _release(self, lease: Lease) -> None:
        try:
            await lease.join_streams()
        except Exception as error:  # a rank has gone, and this worker ends; other ranks may still read the blocks
            logger.error("the blocks of a prompt stay in use: %s", error)
            return
        finally:
            del self._leases[lease.sequence.id]
        self.engine.send(Release(lease.sequence.id))

    async def _serve(self, lease: Lease, trace: bool) -> AsyncIterator[prefill_pb2.PrefillResponse]:
        computed = ended = False
        while not ended:
            event = await lease.events.get()
            response = prefill_pb2.PrefillResponse()
            while True:
                if isinstance(event, Exception):
                    raise event
                if isinstance(event, PrefillScheduled):
                    await lease.begin_streams(event)  # the decode worker pulls when it hears of it
                if event is not None:
                    self._note(lease, event, response)
                    computed = computed or isinstance(event, PromptComputed)
                if lease.events.empty():
                    break
                event = lease.events.get_nowait()
            ended = computed and (lease.sender.complete or lease.released)
            if ended and trace:
                if lease.ranks is not None:  # they know when they sent
                    await lease.join_streams()
                response.done.trace.CopyFrom(lease.finished_trace())
            if response.ListFields():
                yield response

    def _note(self, lease: Lease, event: PrefillEvent, response: prefill_pb2.PrefillResponse) -> None:
        """Adds an event to the next response."""
        match event:
            case PrefillScheduled(cached_tokens=cached, time_ns=now):
                self._metrics.scheduled((now - lease.received_ns) / 1e9)
                tracing.current().past("prefill.queue", lease.received_ns, now)
                tracing.current().set(cached_tokens=cached)
                response.scheduled.queue_ns = now - lease.received_ns
                response.scheduled.cached_tokens = cached
            case ChunkComputed(token_start=start, token_end=end):
                start = max(start, lease.spec.tokens[0])
                if end > start:
                    if not response.HasField("ready"):
                        response.ready.token_start = start
                    response.ready.token_end = end
            case PromptComputed(first=first, time_ns=now, scores=scores):
                self._metrics.computed((now - lease.scheduled_ns) / 1e9)
                tracing.current().past("prefill.compute", lease.scheduled_ns, now)
                lease.trace.first_token_sent_ns = time.monotonic_ns() - lease.scheduled_ns
                if first is not None or scores is not None or lease.tells_times:
                    response.first_token.CopyFrom(first_token_to_proto(first, scores, lease.scheduled_ns, now))
            case SequenceFailed():
                event.raise_for("prefill")
            case _:
                pass

    async def _read_acknowledgements(self, lease: Lease, requests: AsyncIterator[prefill_pb2.PrefillRequest]) -> None:
        async for request in requests:
            kind = request.WhichOneof("message")
            if kind == "release":
                lease.released = True
                return
            if kind != "ack":
                raise InvalidRequest("message", "only AckKv and ReleaseKv may follow StartPrefill")
            for box in request.ack.ranges:
                lease.sender.acknowledge(KvRange.from_proto(box))
            if lease.sender.complete:
                return
        raise Unavailable("the decode worker stopped acknowledging")


def _check_start(start: prefill_pb2.StartPrefill, sampling: SamplingParams, served: ServedHalf) -> None:
    """Raises InvalidRequest or Incompatible, which name the field, unless the request can be served."""
    if len(start.transfer_id) != TRANSFER_ID_BYTES:
        raise InvalidRequest("transfer_id", f"must have {TRANSFER_ID_BYTES} bytes; got {len(start.transfer_id)}")
    length = len(start.prompt_token_ids)
    if length == 0:
        raise InvalidRequest("prompt_token_ids", "is empty")
    if length > served.max_model_len:
        raise PromptTooLong("prompt_token_ids", f"has {length} tokens; the limit here is {served.max_model_len}")
    check_token_ids("prompt_token_ids", start.prompt_token_ids, served.config.vocab_size)
    if start.already_held_tokens >= (shared := shared_tokens(start)):
        raise InvalidRequest(
            "already_held_tokens", f"must be less than the prompt's {shared} tokens; got {start.already_held_tokens}"
        )
    if start.sample_first_token and shared < length:
        raise InvalidRequest("sample_first_token", "is true, but the decoder computes the prompt's last tokens")
    layers = list(start.layers)
    if not layers or layers != sorted(set(layers)) or layers[-1] >= served.config.num_layers:
        raise InvalidRequest("layers", f"must be ascending, distinct and below {served.config.num_layers}")
    if start.codec not in served.codecs:
        raise Incompatible(f"this worker does not offer KV codec {start.codec}", ["codec"])
    sampling.check_vocab(served.config.vocab_size)
    if start.sample_first_token and sampling.seed is None and not sampling.greedy:
        raise InvalidRequest("sampling.seed", "is required between workers")

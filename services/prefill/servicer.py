"""The Prefill service: each RPC is a lease on the KV of one prompt. Token ids only; no text, no routing."""

from __future__ import annotations

import asyncio
import logging
import sys
import time
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import Executor
from contextlib import aclosing, asynccontextmanager

from overfill.engine.protocol import ServedHalf
from overfill.engine.sequence import (
    AwaitingImport,
    ChunkComputed,
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
from overfill.kv.chunks import TRANSFER_ID_BYTES
from overfill.kv.imports import Importer
from overfill.kv.ranges import KvRange
from overfill.kv.shm import ShmServer
from overfill.kv.stall import DEFAULT_LIMITS, TransferLimits
from overfill.request.params import SamplingParams, check_token_ids
from overfill.rpc.constants import MAX_KV_AT_ONCE
from overfill.rpc.interceptors import Context
from overfill.rpc.worker import WorkerHost, check_start, shared_tokens
from overfill.telemetry import logs, tracing
from overfill.telemetry.metrics import PrefillMetrics
from overfill.telemetry.outcomes import outcome_of
from overfill.v1 import kv_pb2, prefill_pb2, registry_pb2
from services.engine_loans import EngineLoans
from services.hosting import EnginePort
from services.importing import import_prompt
from services.lending import Lender, LendingServicer
from services.messages import first_token_to_proto
from services.prefill.lease import Lease
from services.prompt_hasher import PromptHasher

_MAX_CUT_SHORT = 4096
"""Maximum number of transfer ids that are not given to another lease. It is more than a step lasts: the engine tells
nothing of a prompt once it has handled its release."""

logger = logging.getLogger(__name__)


class PrefillServicer(LendingServicer):
    """Serves the RPCs of a prefill worker. The process sets ``engine`` and ``host`` before the server starts.

    Args:
        executor: threads that copy KV out of the cache.
        max_leases: maximum number of prompts at once, waiting ones included.
        shm_server: shares memory with decode workers on this host.
        max_loans: maximum number of loans to other workers at once; 0 means that the worker lends nothing.

    Attributes:
        loans: the engine's loans, for other workers and for the disk.
        importer: imports KV that the prefix cache lacks; None means that every prompt is computed.
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
        max_loans: int = 0,
    ) -> None:
        self._metrics = metrics or PrefillMetrics()
        self._limits = limits
        self._hasher = PromptHasher(served.blocks_of)
        self._max_leases = max_leases
        self._executor = executor
        self.loans = EngineLoans(lambda message: self.engine.send(message))
        self.importer: Importer | None = None
        shm_server = shm_server or ShmServer(enabled=False)
        lender = Lender(
            *(served, hello, self.loans, executor, max_loans, shm_server, self._metrics),
            is_lease=lambda transfer_id: transfer_id.hex() in self._leases,
        )
        super().__init__(lender, served, hello, shm_server)
        self._leases: dict[str, Lease] = {}  # by the id of the sequence, the transfer's in hexadecimal digits
        self._cut_short: dict[str, None] = {}  # ids of ended leases, of whose prompts the engine may still tell
        self._releases: set[asyncio.Task[None]] = set()

    @property
    def active(self) -> int:
        return len(self._leases)

    def end_all(self, error: OverfillError) -> None:
        """Ends every lease with ``error``; the decode workers then ask for another prefill worker."""
        for lease in self._leases.values():
            lease.events.put_nowait(error)

    def on_events(self, events: Sequence[PrefillEvent]) -> None:
        """Passes engine events to their leases and loans. Call it on the event loop."""
        for event in events:
            if isinstance(event, Lent):
                self.loans.on_event(event)
            elif lease := self._leases.get(event.id):
                lease.on_event(event)

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
        """Yields encoded ``KvChunk``s of a lease or a loan."""
        self._check_has_kv("PullKv")
        lease = self._leases.get(request.transfer_id.hex())
        stream = self._lender.pull(request) if lease is None else lease.streams.serve(request, self._shm_server)
        async with aclosing(stream) as messages:
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
        blocks = await self._hasher.blocks_of(prompt, start.cache_namespace)
        return PrefillSequence(
            id=start.transfer_id.hex(),
            prompt=prompt,
            sampling=sampling,
            sample_index=start.sample_index,
            sample_first_token=start.sample_first_token,
            processor=processor,
            cache_namespace=start.cache_namespace,
            prompt_blocks=blocks,
            trace=start.trace,
            scores=self._half.new_scores(sampling),
            follower=rest[0] if rest else None,
            imports=self.importer is not None and self.importer.may_import(_holder_of(start), blocks),
        )

    def _accept(self, start: prefill_pb2.StartPrefill, sequence: PrefillSequence) -> Lease:
        """Registers a lease and submits its prompt. Raises if it cannot be accepted now."""
        self._check_open(start)  # again: compiling a grammar takes time
        if sequence.id in self._leases or sequence.id in self._cut_short or self._lender.lends(start.transfer_id):
            raise InvalidRequest("transfer_id", "is in use by a running transfer, or was lately")
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
            if not lease.computed:  # another lease with this id would take its late events for its own
                self._cut_short[lease.sequence.id] = None
                if len(self._cut_short) > _MAX_CUT_SHORT:
                    del self._cut_short[next(iter(self._cut_short))]
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
            case AwaitingImport():
                lease.begin_import(self._import(lease, event))
            case PrefillScheduled(cached_tokens=cached, time_ns=now):
                self._metrics.scheduled((now - lease.received_ns) / 1e9)
                tracing.current().past("prefill.queue", lease.received_ns, now)
                tracing.current().set(cached_tokens=cached)
                response.scheduled.queue_ns = now - lease.received_ns
                response.scheduled.cached_tokens = cached
                response.scheduled.peer_tokens = lease.imports.peer_tokens
                response.scheduled.disk_tokens = lease.imports.disk_tokens
            case ChunkComputed(token_start=start, token_end=end):
                start = max(start, lease.spec.tokens[0])
                if end > start:
                    if not response.HasField("ready"):
                        response.ready.token_start = start
                    response.ready.token_end = end
            case PromptComputed(first=first, time_ns=now, scores=scores):
                self._metrics.computed((now - lease.scheduled_ns) / 1e9)
                tracing.current().past("prefill.compute", lease.scheduled_ns, now)
                if self.importer is not None and (computed := lease.sequence.prompt_blocks) is not None:
                    self.importer.note_computed(computed)
                lease.trace.first_token_sent_ns = time.monotonic_ns() - lease.scheduled_ns
                if first is not None or scores is not None or lease.tells_times:
                    response.first_token.CopyFrom(first_token_to_proto(first, scores, lease.scheduled_ns, now))
            case SequenceFailed():
                event.raise_for("prefill")
            case _:
                pass

    async def _import(self, lease: Lease, awaiting: AwaitingImport) -> None:
        """Answers the engine, which waits for what can be imported of the prompt."""
        began_ns = time.monotonic_ns()
        start = lease.start
        lease.imports = await import_prompt(
            self.importer, lease.sequence, awaiting, _holder_of(start), start.request_id, self.engine.send
        )
        tracing.current().past("prefill.import", began_ns, time.monotonic_ns())

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


def _holder_of(start: prefill_pb2.StartPrefill) -> kv_pb2.KvHolder | None:
    """Returns the worker that has more of the prompt's KV, if the router has named one."""
    return start.holder if start.HasField("holder") else None


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

"""The Decode service: one stream per router, one session per sequence. Token ids only; no text, no routing."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Iterator, Sequence
from concurrent.futures import Executor
from contextlib import asynccontextmanager, contextmanager
from typing import Protocol

from overfill.engine.protocol import ServedHalf
from overfill.engine.sequence import AdapterChanged, DecodeEvent, DecodeSequence, Lent, StepSampled, StopRule
from overfill.errors import InvalidRequest, OverfillError, PromptTooLong, Unavailable
from overfill.kv.cut_blocks import CutBlocks
from overfill.kv.keys import codec_namespace
from overfill.kv.peers import PeerPool, PrefillPeer
from overfill.kv.puller import LocalPuller
from overfill.kv.receiver import Handoff, PromptPull
from overfill.kv.stall import DEFAULT_LIMITS, TransferLimits
from overfill.request.names import CODEC_NAMES
from overfill.request.params import SamplingParams, check_token_ids
from overfill.rpc.interceptors import Context
from overfill.rpc.sequences import ServedSequence, serve_sequences
from overfill.rpc.worker import WorkerHost, check_start, fill_description, shared_tokens
from overfill.telemetry import tracing
from overfill.telemetry.metrics import DecodeMetrics
from overfill.v1 import common_pb2, decode_pb2, decode_pb2_grpc, kv_pb2, prefill_pb2, registry_pb2
from services.decode.adapters import WorkerAdapters
from services.decode.sequence_session import SequenceSession
from services.decode.shared_transfers import SharedTransfer
from services.engine_loans import EngineLoans
from services.hosting import EnginePort
from services.messages import worker_load
from services.prompt_hasher import PromptHasher


class OwnPrefills(Protocol):
    """The prefill stage of this worker, as its decode stage uses it."""

    def fits(self, prompt_tokens: int) -> bool:
        """True if a prompt of this length fits the full model's context and KV cache."""
        ...

    def handoff(self, session: SequenceSession, holder: kv_pb2.KvHolder | None) -> Handoff:
        """Returns the prefill of the session's prompt into the blocks that the session holds now.

        Args:
            holder: worker that has more of the prompt's KV than this one; None means none.
        """
        ...


class DecodeServicer(decode_pb2_grpc.DecodeServicer):
    """Serves Serve and Describe. The process sets ``engine`` and ``host`` before the server starts.

    Args:
        executor: threads that check received KV and write it to the cache.
        codec: encoding in which KV is requested unless the request names another.

    Attributes:
        metrics: counts reservations, handoffs and ends.
        transfers, cut_blocks: see ``SharingWorker``.
        own_prefills: the prefill stage of this worker; None without one.
        adapters: the worker's adapters; None without any.
        loans: the engine's loans to workers that prefill.
    """

    engine: EnginePort
    host: WorkerHost

    def __init__(
        self,
        served: ServedHalf,
        hello: registry_pb2.Hello,
        peers: PeerPool,
        executor: Executor,
        codec: common_pb2.KvCodec = common_pb2.KV_CODEC_RAW,
        metrics: DecodeMetrics | None = None,
        limits: TransferLimits = DEFAULT_LIMITS,
    ) -> None:
        self.metrics = metrics or DecodeMetrics()
        self._limits = limits
        self._half = served
        self._hasher = PromptHasher(served.blocks_of)
        self._codec = codec
        self._hello = hello
        self._peers = peers
        self._executor = executor
        self.transfers: dict[SharedTransfer, None] = {}
        self.cut_blocks: CutBlocks | None = None
        if served.ranks is None:
            self.cut_blocks = CutBlocks(served.store, served.kv, served.config.num_layers, executor)
        self.own_prefills: OwnPrefills | None = None
        self.adapters: WorkerAdapters | None = None
        self.loans = EngineLoans(self.send)
        self._sessions: dict[str, SequenceSession] = {}

    @property
    def active(self) -> int:
        return len(self._sessions)

    def end_all(self, error: OverfillError) -> None:
        """Ends every sequence with ``error``; their routers continue them on other workers."""
        for session in self._sessions.values():
            session.inbox.put_nowait(error)

    def on_events(self, events: Sequence[DecodeEvent]) -> None:
        """Passes engine events to their sessions. Call it on the event loop."""
        for event in events:
            if isinstance(event, StepSampled):
                self._on_step(event)
            elif isinstance(event, Lent):
                self.loans.on_event(event)
            elif isinstance(event, AdapterChanged):
                if self.adapters is not None:
                    self.adapters.on_changed(event)
            elif session := self._sessions.get(event.id):
                session.take(event)

    def _on_step(self, step: StepSampled) -> None:
        sessions, not_plain = self._sessions, step.not_plain
        for row, id in enumerate(step.ids):
            if (session := sessions.get(id)) is None:
                continue
            if id in not_plain or not session.take_plain(step.indices[row], step.token_ids[row]):
                session.take(step.part(row))

    async def Describe(
        self, request: decode_pb2.DescribeDecodeRequest, context: Context
    ) -> decode_pb2.DescribeDecodeResponse:
        description = decode_pb2.DescribeDecodeResponse(layer_map=self._half.pair.layer_map)
        return fill_description(description, self._hello)

    async def Serve(self, request_iterator: AsyncIterator[decode_pb2.RouterMessage], context: Context) -> None:
        await serve_sequences(request_iterator, context, self._run)

    async def _run(self, served: ServedSequence) -> None:
        """Runs one sequence of a router's stream."""
        start = served.start
        tracing.current().set(
            request_id=start.request_id,
            worker=self._hello.worker_id,
            prompt_tokens=len(start.prompt_token_ids),
            emitted_tokens=len(start.emitted_token_ids),
        )
        check_start(start, self._hello, draining=self.host.draining)
        with self._use_adapter(start.adapter_digest) as slot:
            sequence = await self._parse(start, slot)
            check_start(start, self._hello, draining=self.host.draining)  # again: compiling a grammar takes time
            session = self._sessions[sequence.id] = SequenceSession(served, sequence, self)
            try:
                await session.run()
            finally:
                del self._sessions[sequence.id]

    @contextmanager
    def _use_adapter(self, digest: str) -> Iterator[int | None]:
        """Yields the slot of an adapter, which is kept for the sequence; None for no digest. Raises Unavailable."""
        if not digest:
            yield None
        elif self.adapters is None:
            raise Unavailable(f"{self._hello.worker_id} has no adapters")
        else:
            with self.adapters.use(digest) as slot:
                yield slot

    async def _parse(self, start: decode_pb2.StartDecode, adapter: int | None) -> DecodeSequence:
        """Returns the sequence that ``start`` asks for, as the engine takes it. ``adapter``: slot of its adapter.

        Raises:
            InvalidRequest: a field is out of range, or the grammar is not supported.
        """
        sampling = SamplingParams.from_proto(start.sampling)
        self._check(start, sampling)
        prompt, shared = list(start.prompt_token_ids), shared_tokens(start)
        own = shared < len(prompt)  # the decoder computes tokens of the prompt
        scores = self._half.new_scores(sampling) if own else None
        processor = await self._half.prepare_processor(sampling, prompt, start.eos_token_ids, start.cache_namespace)
        namespace = self._cache_namespace(start)
        return DecodeSequence(
            id=secrets.token_hex(8),
            prompt=prompt,
            emitted=list(start.emitted_token_ids),
            sampling=sampling,
            stop=StopRule.of(sampling, start.eos_token_ids, self._half.max_model_len - len(prompt)),
            sample_index=start.sample_index,
            processor=processor,
            cache_namespace=namespace,
            prompt_blocks=await self._hasher.blocks_of(prompt[:shared], namespace),
            answer_start=shared if own else None,
            adapter=adapter,
            scores=None if start.emitted_token_ids else scores,
        )

    def _cache_namespace(self, start: decode_pb2.StartDecode) -> str:
        """Returns the namespace within which prompts share cached prefixes; of raw KV, that of prefill workers too."""
        return codec_namespace(start.cache_namespace, CODEC_NAMES[start.codec or self._codec])

    def send(self, message: object) -> None:
        """Sends a message to the engine."""
        self.engine.send(message)

    def load(self) -> decode_pb2.WorkerLoad:
        """Returns the load of the decode stage."""
        return worker_load(self.engine.load, self._half.store.block_size)

    @asynccontextmanager
    async def new_handoff(self, target: decode_pb2.AssignPrefill, session: SequenceSession) -> AsyncIterator[Handoff]:
        """Connects to the assigned prefill worker and yields the handoff of the prompt's KV to the session's blocks."""
        itself = (target.worker_id, target.incarnation) == (self._hello.worker_id, self._hello.incarnation)
        holder = target.holder if target.HasField("holder") else None
        if itself and self.own_prefills is not None:
            yield self.own_prefills.handoff(session, holder)
            return
        async with self._peers.use(target) as peer:
            yield self._new_pull(peer, session, holder)

    def on_drain(self) -> None:
        """Lets sequences that wait for a prefill worker turn to this one: routers assign none that drains."""
        for session in self._sessions.values():
            if (own := self.own_assignment(len(session.sequence.prompt))) is not None:
                session.inbox.put_nowait(own)  # ignored unless the session waits for one

    def own_assignment(self, prompt_tokens: int) -> decode_pb2.AssignPrefill | None:
        """Returns an assignment of this worker, while it drains and if it can prefill such a prompt."""
        if self.own_prefills is None or not self.host.draining or not self.own_prefills.fits(prompt_tokens):
            return None
        return decode_pb2.AssignPrefill(worker_id=self._hello.worker_id, incarnation=self._hello.incarnation)

    def _check(self, start: decode_pb2.StartDecode, sampling: SamplingParams) -> None:
        vocab, longest = self._half.config.vocab_size, self._half.max_model_len
        prompt, emitted = len(start.prompt_token_ids), len(start.emitted_token_ids)
        if prompt == 0:
            raise InvalidRequest("prompt_token_ids", "is empty")
        if prompt + max(1, emitted) > longest:
            raise PromptTooLong(
                "prompt_token_ids",
                f"{prompt} prompt tokens and {emitted} answer tokens do not fit the context length of {longest}",
            )
        check_token_ids("prompt_token_ids", start.prompt_token_ids, vocab)
        check_token_ids("emitted_token_ids", start.emitted_token_ids, vocab)
        if start.codec and start.codec not in CODEC_NAMES:
            raise InvalidRequest("kv_codec", f"unknown codec {start.codec}")
        sampling.check_vocab(vocab)
        if sampling.max_tokens is None:
            raise InvalidRequest("sampling.max_tokens", "is required between router and worker")
        if sampling.max_tokens <= emitted:
            raise InvalidRequest(
                "emitted_token_ids", f"{emitted} tokens already reach max_tokens {sampling.max_tokens}"
            )
        if emitted and prompt + emitted == longest:
            raise InvalidRequest("emitted_token_ids", f"{emitted} tokens already fill the context length of {longest}")
        if sampling.seed is None and not sampling.greedy:
            raise InvalidRequest("sampling.seed", "is required between router and worker")

    def _new_pull(self, peer: PrefillPeer, session: SequenceSession, holder: kv_pb2.KvHolder | None) -> PromptPull:
        start = session.start
        request = prefill_pb2.StartPrefill(
            request_id=start.request_id,
            attempt=start.attempt,
            prompt_token_ids=session.sequence.prompt,
            sampling=start.sampling,
            sample_index=start.sample_index,
            sample_first_token=session.wants_first_token,
            cache_namespace=start.cache_namespace,
            codec=start.codec or self._codec,
            trace=start.trace,
            answer_start=session.sequence.answer_start,
            holder=holder,
        )
        if not session.wants_scores:
            request.sampling.ClearField("prompt_logprobs")
        ranks = self._half.ranks
        return PromptPull(
            peer,
            request,
            self._half.kv,
            self._half.pair.layer_map,
            LocalPuller(self._half.store, self._executor, peer.data, peer.link) if ranks is None else ranks.puller,
            session.blocks,
            self._half.config.vocab_size,
            session.held_tokens,
            self._limits,
        )

"""A mock decode worker: it fetches KV like a real one, discards it, and answers with the tokens of a script."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

from overfill.errors import Incompatible, InvalidRequest, OverfillError, Unavailable
from overfill.kv.chunks import TransferSpec, check
from overfill.kv.handshake import KvIdentity, check_compatible, check_data_addresses, data_address
from overfill.kv.ranges import KvRange
from overfill.kv.wire import parse_message, pull_kv
from overfill.request.params import SamplingParams
from overfill.rpc.calls import checked_response, checked_write, responses
from overfill.rpc.channel import open_channel
from overfill.rpc.interceptors import Context
from overfill.rpc.sequences import ServedSequence, serve_sequences
from overfill.rpc.server import RpcServer
from overfill.rpc.worker import fill_description
from overfill.settings.mock import MockColocatedConfig, MockDecodeConfig
from overfill.telemetry.metrics import DecodeMetrics, PrefillMetrics
from overfill.v1 import common_pb2, decode_pb2, decode_pb2_grpc, prefill_pb2, prefill_pb2_grpc
from services.mock.tokens import Script, Speaker
from services.mock.worker import MockLoad, MockWorker

_Update = decode_pb2.SequenceUpdate
_Need = decode_pb2.NeedPrefill


@dataclass(slots=True, eq=False)
class _Sequence:
    start: decode_pb2.StartDecode
    sampling: SamplingParams
    speaker: Speaker
    blocks: int
    emitted: list[int]
    put: Callable[[decode_pb2.SequenceUpdate], None]
    ended: asyncio.Future[None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    prefill_worker: str = ""
    first_known: int | None = None
    first_step: int | None = None
    untold: bool = True  # no token of a decode step has told the router of the handoff

    def take(self, token: int, **timing: Any) -> bool:
        """Emits ``token`` unless it is a stop token. Returns True when the sequence has ended."""
        stops = set(self.sampling.stop_token_ids)
        if not self.sampling.ignore_eos:
            stops.update(self.start.eos_token_ids)
        if token in stops:
            self._done(common_pb2.FINISH_REASON_STOP)
            return True
        scored = self.speaker.logprobs(token)
        tokens = decode_pb2.Tokens(
            first_index=len(self.emitted), ids=[token], logprobs=[] if scored is None else [scored], **timing
        )
        self.emitted.append(token)
        if self.untold:
            self.untold = self.first_step is None
            tokens.so_far.CopyFrom(self._so_far())
        self.put(_Update(tokens=tokens))
        if len(self.emitted) >= self.sampling.max_tokens:  # type: ignore[operator]  # checked when accepted
            self._done(common_pb2.FINISH_REASON_LENGTH)
            return True
        return False

    def _so_far(self) -> decode_pb2.DecodeDone:
        """Returns what ``DecodeDone`` would say now, without a reason."""
        so_far = decode_pb2.DecodeDone(
            usage=common_pb2.Usage(prompt_tokens=len(self.start.prompt_token_ids), completion_tokens=len(self.emitted)),
            prefill_worker_id=self.prefill_worker,
            codec=common_pb2.KV_CODEC_RAW,
        )
        if self.first_step is not None:
            so_far.decode_ns = time.monotonic_ns() - self.first_step
            if self.first_known is not None:
                so_far.handoff_exposed_ns = self.first_step - self.first_known
        return so_far

    def _done(self, reason: common_pb2.FinishReason) -> None:
        done = self._so_far()
        done.reason = reason
        self.put(_Update(done=done))
        if not self.ended.done():
            self.ended.set_result(None)

    def fail(self, error: Exception) -> None:
        """Ends the sequence with ``error``."""
        if not self.ended.done():
            self.ended.set_exception(error)


class MockDecode(decode_pb2_grpc.DecodeServicer):
    """Serves Decode. Each step gives every running sequence one token."""

    stage = common_pb2.STAGE_DECODE

    def __init__(
        self,
        config: MockDecodeConfig | MockColocatedConfig,
        script: Script,
        worker: MockWorker,
        beside: PrefillMetrics | None = None,
    ) -> None:
        self.metrics = DecodeMetrics(beside)
        self._worker = worker
        self._config = config
        self._script = script
        self._sequences: set[_Sequence] = set()
        self._running: set[_Sequence] = set()
        self._wake = asyncio.Event()
        self._stepping: asyncio.Task[None] | None = None
        self._peers: dict[tuple[str, int], _Peer] = {}

    def add_to(self, server: RpcServer) -> None:
        server.add(decode_pb2_grpc.add_DecodeServicer_to_server, self, "overfill.v1.Decode")

    @property
    def active(self) -> int:
        return len(self._sequences)

    def load(self) -> MockLoad:
        return MockLoad(
            sum(sequence.blocks for sequence in self._sequences),
            self._config.mock_kv_blocks,
            running=len(self._running),
            waiting=len(self._sequences) - len(self._running),
        )

    def end_all(self, error: OverfillError) -> None:
        for sequence in self._sequences:
            sequence.fail(error)

    async def close(self) -> None:
        if self._stepping is not None:
            self._stepping.cancel()
        for peer in self._peers.values():
            await peer.close()

    async def Describe(
        self, request: decode_pb2.DescribeDecodeRequest, context: Context
    ) -> decode_pb2.DescribeDecodeResponse:
        description = decode_pb2.DescribeDecodeResponse(layer_map=self._worker.pair.layer_map)
        return fill_description(description, self._worker.hello)

    async def Serve(self, request_iterator: AsyncIterator[decode_pb2.RouterMessage], context: Context) -> None:
        await serve_sequences(request_iterator, context, self._run)

    async def _run(self, served: ServedSequence) -> None:
        received = time.monotonic_ns()
        sequence = await self._accept(served)
        if sequence is None:
            served.put(
                _Update(
                    refused=decode_pb2.Refused(
                        load=self.load().to_proto(self._worker.block_size), reason="no blocks are free"
                    )
                )
            )
            return
        reserved = decode_pb2.Reserved(blocks=sequence.blocks, reservation_ns=time.monotonic_ns() - received)
        served.put(_Update(reserved=reserved))
        if served.start.HasField("assign_prefill"):
            served.commands.put_nowait(served.start.assign_prefill)
        handing_over = asyncio.create_task(self._hand_over(sequence, served.commands))
        try:
            await sequence.ended
        finally:
            handing_over.cancel()
            self._sequences.discard(sequence)
            self._running.discard(sequence)
            self._worker.notify()

    async def _accept(self, served: ServedSequence) -> _Sequence | None:
        """Reserves blocks for a sequence; returns None when too few blocks or slots are free."""
        start = served.start
        self._worker.check_accepts(start.expected_incarnation)
        sampling = SamplingParams.from_proto(start.sampling)
        speaker = await self._script.speaker(sampling, start.sample_index, start.cache_namespace)
        tokens = len(start.prompt_token_ids) + len(start.emitted_token_ids) + 1
        blocks = -(-tokens // self._worker.block_size)
        free = self._config.mock_kv_blocks - sum(sequence.blocks for sequence in self._sequences)
        if blocks > free or len(self._sequences) >= self._config.max_num_seqs:
            return None
        sequence = _Sequence(start, sampling, speaker, blocks, list(start.emitted_token_ids), served.put)
        self._sequences.add(sequence)
        self._worker.notify()
        return sequence

    async def _hand_over(self, sequence: _Sequence, commands: asyncio.Queue[Any]) -> None:
        """Fetches the prompt's KV from each assigned prefill worker until one has completed the handoff."""
        while True:
            target = await commands.get()
            if not isinstance(target, decode_pb2.AssignPrefill):
                continue
            try:
                ended = await self._peer(target).prefill(sequence, target, self._config.mock_kv_layers)
            except InvalidRequest as error:
                sequence.fail(error)
                return
            except OverfillError as error:
                incompatible = isinstance(error, Incompatible)
                reason = _Need.REASON_INCOMPATIBLE if incompatible else _Need.REASON_PREFILL_FAILED
                need = _Need(reason=reason, detail=str(error), worker_id=target.worker_id)
                sequence.put(_Update(need_prefill=need))
                continue
            except Exception as error:  # a defect of the mock: report it, or the request would wait for ever
                sequence.fail(error)
                return
            sequence.prefill_worker = target.worker_id
            if not ended:
                self._running.add(sequence)
                self._wake.set()
                if self._stepping is None:
                    self._stepping = asyncio.ensure_future(self._step())

    async def _step(self) -> None:
        while True:
            self._wake.clear()
            if not self._running:
                await self._wake.wait()
            started = time.monotonic_ns()
            batch = list(self._running)
            await asyncio.sleep(self._config.mock_step + self._config.mock_per_sequence * len(batch))
            for sequence in batch:
                sequence.first_step = sequence.first_step or started
                try:
                    ended = sequence.take(sequence.speaker.next(sequence.emitted))
                except OverfillError as error:
                    ended = True
                    sequence.fail(error)
                if ended:
                    self._running.discard(sequence)

    def _peer(self, target: decode_pb2.AssignPrefill) -> _Peer:
        key = (target.address, target.incarnation)
        if key not in self._peers:
            self._peers[key] = _Peer(self._worker, target)
        return self._peers[key]


class _Peer:
    """Connections to one prefill worker: one for control, one for KV."""

    def __init__(self, worker: MockWorker, target: decode_pb2.AssignPrefill) -> None:
        self._worker = worker
        self._target = target
        self._name = target.worker_id
        tls = worker.config.credentials()
        self._control = open_channel(target.address, tls)
        self._stub: Any = prefill_pb2_grpc.PrefillStub(self._control)
        self._data = open_channel(data_address(target), tls)
        self._checked = False

    async def close(self) -> None:
        await self._control.close(None)
        await self._data.close(None)

    async def prefill(self, sequence: _Sequence, target: decode_pb2.AssignPrefill, num_layers: int) -> bool:
        """Fetches one prompt to the end of its lease. Returns True when its first token ended the sequence."""
        await self._handshake()
        start = sequence.start
        prompt = len(start.prompt_token_ids)
        request = prefill_pb2.StartPrefill(
            request_id=start.request_id,
            attempt=start.attempt,
            transfer_id=secrets.token_bytes(16),
            prompt_token_ids=start.prompt_token_ids,
            sampling=start.sampling,
            sample_first_token=not sequence.emitted,
            layers=list(range(min(num_layers, self._worker.kv.num_layers))),
            codec=common_pb2.KV_CODEC_RAW,
            expected_incarnation=target.incarnation,
            sample_index=start.sample_index,
            cache_namespace=start.cache_namespace,
        )
        spec = TransferSpec(request.transfer_id, request.attempt, self._worker.kv, tuple(request.layers), (0, prompt))
        call = self._stub.Prefill()
        ended, queue_ns, pulling = False, 0, None
        try:
            await checked_write(call.write(prefill_pb2.PrefillRequest(start=request)), self._name)
            while True:
                message = await self._next(call, pulling)
                kind = message.WhichOneof("message") if message else None
                if kind == "queued":
                    pulling = asyncio.ensure_future(self._pull(spec, call))
                    pulling.add_done_callback(lambda task: _end_if_failed(task, call))
                elif kind == "scheduled":
                    queue_ns = message.scheduled.queue_ns
                elif kind == "first_token":
                    sequence.first_known = time.monotonic_ns()
                    token = message.first_token
                    ended = sequence.take(
                        token.token_id,
                        prefill_queue_ns=queue_ns,
                        prefill_compute_ns=token.compute_ns,
                        return_ns=token.return_ns,
                    )
                    if ended:
                        return True
                elif kind == "done":
                    return ended
                elif kind is None:
                    raise Unavailable(f"{self._name} ended the stream before the prompt was handed over")
        finally:
            if pulling is not None:
                pulling.cancel()
            call.cancel()

    async def _next(self, call: Any, pulling: asyncio.Task[None] | None) -> Any:
        """Returns the next message of the control stream. Raises the data stream's error if that has ended it."""
        try:
            return await checked_response(call.read(), self._name)
        except OverfillError:
            if pulling is not None and pulling.done():
                await pulling
            raise

    async def _pull(self, spec: TransferSpec, call: Any) -> None:
        box = KvRange(0, len(spec.layers), *spec.tokens, 0, spec.kv.num_kv_heads)
        request = prefill_pb2.PullKvRequest(transfer_id=spec.transfer_id, attempt=spec.attempt, ranges=[box.to_proto()])
        async for message in responses(pull_kv(self._data, request, None), self._name):
            boxes = [check(spec, chunk) for chunk in parse_message(message)]
            ack = prefill_pb2.AckKv(ranges=[box.to_proto() for box in boxes])
            await checked_write(call.write(prefill_pb2.PrefillRequest(ack=ack)), self._name)

    async def _handshake(self) -> None:
        if not self._checked:
            described = self._stub.Describe(prefill_pb2.DescribePrefillRequest())
            answer = await checked_response(described, self._name)
            theirs = KvIdentity.from_proto(answer.wire_version, answer.model, answer.kv)
            check_compatible(self._worker.identity, theirs, self._name)
            check_data_addresses(self._target, self._worker.kv)
            self._checked = True


def _end_if_failed(pulling: asyncio.Task[None], call: Any) -> None:
    """Logs a failed pull and ends its control stream, because no task awaits the pull at this point."""
    if not pulling.cancelled() and pulling.exception() is not None:
        logging.error("a pull failed", exc_info=pulling.exception())
        call.cancel()

"""A mock prefill worker: it sleeps instead of computing, and sends zeros for KV."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator

from overfill.errors import InvalidRequest, OverfillError, TransferFailed
from overfill.kv.chunks import TransferSpec, seal
from overfill.kv.ranges import KvRange
from overfill.kv.wire import add_prefill_to_server, join_chunks
from overfill.request.params import SamplingParams
from overfill.rpc.constants import MAX_CHUNK_PAYLOAD
from overfill.rpc.interceptors import Context
from overfill.rpc.server import RpcServer
from overfill.rpc.worker import fill_description
from overfill.settings.mock import MockColocatedConfig, MockPrefillConfig
from overfill.telemetry.metrics import PrefillMetrics
from overfill.v1 import common_pb2, decode_pb2, prefill_pb2, prefill_pb2_grpc
from services.mock.tokens import Script
from services.mock.worker import MockLoad, MockWorker

_Response = prefill_pb2.PrefillResponse


class _Lease:
    """A prompt. All its KV is ready once ``computed`` is set."""

    def __init__(self, start: prefill_pb2.StartPrefill, worker: MockWorker) -> None:
        tokens = len(start.prompt_token_ids)
        self.spec = TransferSpec(
            start.transfer_id, start.attempt, worker.kv, tuple(start.layers), (start.already_held_tokens, tokens)
        )
        held = start.already_held_tokens
        self.missing_vectors = 2 * len(start.layers) * (tokens - held) * worker.kv.num_kv_heads
        self.blocks = -(-tokens // worker.block_size)
        self.computed = asyncio.Event()
        self.acknowledged: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def read_acknowledgements(self, requests: AsyncIterator[prefill_pb2.PrefillRequest]) -> None:
        async for request in requests:
            self.missing_vectors -= sum(KvRange.from_proto(box).num_vectors for box in request.ack.ranges)
            if self.missing_vectors <= 0 and not self.acknowledged.done():
                self.acknowledged.set_result(None)

    def fail(self, error: OverfillError) -> None:
        """Ends the lease with ``error`` once the prompt is computed."""
        if not self.acknowledged.done():
            self.acknowledged.set_exception(error)


class MockPrefill(prefill_pb2_grpc.PrefillServicer):
    """Serves Prefill. It computes one prompt at a time."""

    stage = common_pb2.STAGE_PREFILL

    def __init__(self, config: MockPrefillConfig | MockColocatedConfig, script: Script, worker: MockWorker) -> None:
        self.metrics = PrefillMetrics()
        self._worker = worker
        self._config = config
        self._script = script
        self._leases: dict[bytes, _Lease] = {}
        self._device = asyncio.Lock()
        self._queued_tokens = 0

    def add_to(self, server: RpcServer) -> None:
        server.add(add_prefill_to_server, self, "overfill.v1.Prefill")

    @property
    def active(self) -> int:
        return len(self._leases)

    def load(self) -> MockLoad:
        used = sum(lease.blocks for lease in self._leases.values())
        total = self._config.mock_kv_blocks
        return MockLoad(min(total, used), total, running=len(self._leases), queued_tokens=self._queued_tokens)

    def end_all(self, error: OverfillError) -> None:
        for lease in self._leases.values():
            lease.fail(error)

    async def close(self) -> None:
        pass

    async def Describe(
        self, request: prefill_pb2.DescribePrefillRequest, context: Context
    ) -> prefill_pb2.DescribePrefillResponse:
        description = prefill_pb2.DescribePrefillResponse(codecs=[common_pb2.KV_CODEC_RAW])
        return fill_description(description, self._worker.hello)

    async def Prefill(
        self, request_iterator: AsyncIterator[prefill_pb2.PrefillRequest], context: Context
    ) -> AsyncIterator[prefill_pb2.PrefillResponse]:
        first = await anext(aiter(request_iterator), None)
        if first is None or first.WhichOneof("message") != "start":
            raise InvalidRequest("start", "the first message of Prefill is StartPrefill")
        start, received = first.start, time.monotonic_ns()
        self._worker.check_accepts(start.expected_incarnation)
        lease = self._leases[start.transfer_id] = _Lease(start, self._worker)
        taking = asyncio.ensure_future(lease.read_acknowledgements(request_iterator))
        try:
            async for response in self._serve(lease, start, received):
                yield response
        finally:
            taking.cancel()
            del self._leases[start.transfer_id]
            self._worker.notify()

    async def PullKv(self, request: prefill_pb2.PullKvRequest, context: Context) -> AsyncIterator[bytes]:
        lease = self._leases.get(request.transfer_id)
        if lease is None:
            raise TransferFailed("unknown transfer: it has ended or was never started here")
        await lease.computed.wait()
        for message in request.ranges:
            for box in _pieces(lease.spec, KvRange.from_proto(message)):
                yield join_chunks([seal(lease.spec, box, bytes(lease.spec.payload_bytes(box)))])

    async def _serve(
        self, lease: _Lease, start: prefill_pb2.StartPrefill, received: int
    ) -> AsyncIterator[prefill_pb2.PrefillResponse]:
        prompt, sampling = len(start.prompt_token_ids), SamplingParams.from_proto(start.sampling)
        yield _Response(queued=prefill_pb2.PrefillQueued(waiting=max(0, len(self._leases) - 1)))
        self._queued_tokens += prompt
        try:
            async with self._device:
                scheduled = time.monotonic_ns()
                yield _Response(scheduled=prefill_pb2.PrefillScheduled(queue_ns=scheduled - received))
                await asyncio.sleep(self._config.mock_base + self._config.mock_per_token * prompt)
        finally:
            self._queued_tokens -= prompt
        if start.sample_first_token:
            speaker = await self._script.speaker(sampling, start.sample_index, start.cache_namespace)
            token = speaker.next(())
            yield _Response(
                first_token=decode_pb2.Tokens(
                    ids=[token],
                    prefill_compute_ns=time.monotonic_ns() - scheduled,
                    return_ns=0,
                )
            )
        lease.computed.set()
        yield _Response(ready=prefill_pb2.RangesReady(token_start=start.already_held_tokens, token_end=prompt))
        await lease.acknowledged
        yield _Response(done=prefill_pb2.PrefillDone())


def _pieces(spec: TransferSpec, box: KvRange) -> list[KvRange]:
    """Splits ``box`` between tokens into ranges that fit a message."""
    per_token = spec.payload_bytes(box) // box.num_tokens
    step = max(1, MAX_CHUNK_PAYLOAD // per_token)
    ends = [*range(box.token_start + step, box.token_end, step), box.token_end]
    starts = [box.token_start, *ends[:-1]]
    return [
        KvRange(box.layer_start, box.layer_end, start, end, box.head_start, box.head_end)
        for start, end in zip(starts, ends, strict=True)
    ]

"""The sending process of ``overfill bench kv``: a prefill worker without a model, whose KV is random and always ready.

Handshake, lease, chunks, checksums, shared memory and acknowledgements are those of a real prefill worker.
``python -m overfill.lab.bench.kv.sender LAYERS HEADS HEAD_DIM DTYPE TOKENS`` prints its address.
"""

from __future__ import annotations

import asyncio
import gc
import sys
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from typing import Any, cast

import torch

from overfill.engine.device import cpu_settings
from overfill.kv.cache import KvCache
from overfill.kv.chunks import TransferSpec
from overfill.kv.ranges import KvRange
from overfill.kv.sender import KvSender
from overfill.kv.shm import ShmServer
from overfill.kv.spec import DTypeName, KvSpec, RopeSpec
from overfill.kv.wire import SERVICE, add_prefill_to_server
from overfill.rpc.constants import WIRE_VERSION
from overfill.rpc.server import RpcServer
from overfill.v1 import common_pb2, prefill_pb2, prefill_pb2_grpc

BLOCK_SIZE = 16
_READERS = 2  # threads, as in a prefill worker


class _Sender(prefill_pb2_grpc.PrefillServicer):
    def __init__(self, spec: KvSpec, tokens: int) -> None:
        self._spec = spec
        self._blocks = list(range(-(-tokens // BLOCK_SIZE)))
        self._cache = KvCache(spec, len(self._blocks), BLOCK_SIZE, torch.device("cpu"))
        self._cache.k.normal_()
        self._cache.v.normal_()
        self._executor = ThreadPoolExecutor(_READERS, "kv-out")
        self._senders: dict[bytes, KvSender] = {}
        self.shm_server = ShmServer()

    async def Describe(self, request: Any, context: Any) -> prefill_pb2.DescribePrefillResponse:
        return prefill_pb2.DescribePrefillResponse(
            wire_version=WIRE_VERSION,
            worker_id="bench",
            kv=self._spec.to_proto(),
            codecs=[common_pb2.KV_CODEC_RAW],
            shm=self.shm_server.offer,
        )

    async def Prefill(
        self, requests: AsyncIterator[prefill_pb2.PrefillRequest], context: Any
    ) -> AsyncIterator[prefill_pb2.PrefillResponse]:
        start = (await anext(aiter(requests))).start
        tokens = len(start.prompt_token_ids)
        spec = TransferSpec(start.transfer_id, start.attempt, self._spec, tuple(start.layers), (0, tokens), start.codec)
        sender = self._senders[start.transfer_id] = KvSender(spec, self._cache, self._executor)
        sender.begin(self._blocks, tokens, None)
        try:
            yield prefill_pb2.PrefillResponse(scheduled=prefill_pb2.PrefillScheduled(cached_tokens=tokens))
            async for request in requests:
                for box in request.ack.ranges:
                    sender.acknowledge(KvRange.from_proto(box))
                if sender.complete:
                    break
            yield prefill_pb2.PrefillResponse(done=prefill_pb2.PrefillDone())
        finally:
            del self._senders[start.transfer_id]

    async def PullKv(self, request: prefill_pb2.PullKvRequest, context: Any) -> AsyncIterator[bytes]:
        sender = self._senders[request.transfer_id]
        slots = self.shm_server.link(request.link_id).stream(request.stream) if request.link_id else None
        try:
            async with aclosing(
                sender.messages([KvRange.from_proto(box) for box in request.ranges], slots)
            ) as messages:
                async for message in messages:
                    yield message
        finally:
            if slots is not None:
                slots.writes_finished()


async def _serve(layers: str, heads: str, head_dim: str, dtype: str, tokens: str) -> None:
    spec = KvSpec(int(layers), int(heads), int(head_dim), cast(DTypeName, dtype), RopeSpec())
    sender = _Sender(spec, int(tokens))
    sender.shm_server.start()
    server = RpcServer()
    server.add(add_prefill_to_server, sender, SERVICE)
    address = await server.start("127.0.0.1:0")
    gc.freeze()  # as in a worker
    print(address, flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    with cpu_settings(threads=1):  # as a worker is
        asyncio.run(_serve(*sys.argv[1:]))

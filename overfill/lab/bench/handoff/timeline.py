"""Records one handoff on both sides: when each layer runs, when KV leaves, when the first token arrives.

Starts a real prefill worker process, and receives its KV in this process with a decode worker's receiver. No decoder
reads that KV.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from dataclasses import dataclass

import torch

from overfill.kv.cache import KvCache
from overfill.kv.peers import PrefillPeer
from overfill.kv.receiver import PromptPull
from overfill.kv.spec import DTypeName, KvSpec
from overfill.lab.bench.workers import Log, prefill_worker
from overfill.lab.faults.proxy import TcpProxy
from overfill.model.manifest import Pair
from overfill.request.params import SamplingParams
from overfill.v1 import decode_pb2, kv_pb2, prefill_pb2, registry_pb2

_BLOCK_SIZE = 16


@dataclass(frozen=True, slots=True)
class Timeline:
    """Times of events, in seconds.

    Attributes:
        layers: Start and end of each layer of the full model, since the first layer started.
        first_kv_sent, first_token_sent, last_kv_sent: Events on the prefill worker, since the first layer started.
        first_token_received, first_kv_received, last_kv_received: Events on the receiver, since it sent the request.
    """

    tokens: int
    layers: list[tuple[float, float]]
    first_kv_sent: float
    first_token_sent: float
    last_kv_sent: float
    first_token_received: float
    first_kv_received: float
    last_kv_received: float
    kv_bytes: int
    kv_chunks: int

    @property
    def overlaps(self) -> bool:
        """True if the first KV left before the last layer started."""
        return self.first_kv_sent < self.layers[-1][0]

    @property
    def token_before_kv(self) -> bool:
        """True if the first token arrived before the last KV."""
        return self.first_token_received < self.last_kv_received

    @classmethod
    def from_trace(cls, tokens: int, trace: kv_pb2.HandoffTrace) -> Timeline:
        sender = trace.prefill
        return cls(
            tokens,
            [(a / 1e9, b / 1e9) for a, b in zip(sender.layer_start_ns, sender.layer_end_ns, strict=True)],
            sender.first_kv_sent_ns / 1e9,
            sender.first_token_sent_ns / 1e9,
            sender.last_kv_sent_ns / 1e9,
            trace.first_token_received_ns / 1e9,
            trace.first_kv_received_ns / 1e9,
            trace.last_kv_received_ns / 1e9,
            trace.kv_bytes,
            trace.kv_chunks,
        )


async def record_timeline(
    pair: Pair,
    tokens: int,
    *,
    dtype: DTypeName | None,
    threads: int,
    streams: int,
    rate: float | None,
    log: Log,
) -> Timeline:
    """Prefills ``tokens`` random tokens in a single chunk, and records the handoff.

    Args:
        streams: Data connections.
        rate: Limit of each data connection, in bytes per second. None means no limit.
        log: Called with the worker's name and each line of its output.

    Raises:
        Unavailable: The worker did not start.
    """
    arguments = [f"--pair={pair.folder}", f"--max-num-batched-tokens={tokens}", "--no-prefix-cache"]
    if dtype is not None:
        arguments.append(f"--dtype={dtype}")
    async with AsyncExitStack() as stack:
        hello = await stack.enter_async_context(prefill_worker(arguments, threads, log))
        if rate is not None:
            (data,) = hello.data_addresses
            data.address = (await stack.enter_async_context(TcpProxy(data.address, rate))).address
        target = decode_pb2.AssignPrefill(
            worker_id=hello.worker_id,
            incarnation=hello.incarnation,
            address=hello.address,
            data_addresses=hello.data_addresses,
        )
        peer = PrefillPeer(target, streams, None)
        stack.push_async_callback(peer.close)
        executor = stack.enter_context(ThreadPoolExecutor(streams, "kv-in"))
        return await _pull(peer, pair, hello, tokens, executor)


async def _pull(
    peer: PrefillPeer, pair: Pair, hello: registry_pb2.Hello, tokens: int, executor: ThreadPoolExecutor
) -> Timeline:
    spec = KvSpec.from_proto(hello.kv)
    blocks = list(range(-(-tokens // _BLOCK_SIZE)))
    cache = KvCache(spec, len(blocks), _BLOCK_SIZE, torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(0, hello.vocab_size, (tokens,), generator=generator).tolist()
    request = prefill_pb2.StartPrefill(
        request_id="timeline",
        attempt=0,
        prompt_token_ids=prompt,
        sampling=SamplingParams(temperature=0).to_proto(),
        sample_index=0,
        sample_first_token=True,
        trace=True,
    )
    pull = PromptPull(peer, request, spec, pair.layer_map, cache, blocks, executor)

    await pull.run(None, lambda token: None)  # the pull's statistics hold the time of the first token
    return Timeline.from_trace(tokens, pull.stats.to_proto())

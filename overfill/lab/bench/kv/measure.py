"""Measures how fast KV moves between two processes, beside a raw gRPC stream on the same loopback in the same run.

The measured handoff is complete except that its prompt is computed already: request, chunks, checksums, writes into KV
blocks, acknowledgements. No model runs.
"""

from __future__ import annotations

import asyncio
import gc
import sys
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from dataclasses import replace

import torch

from overfill.errors import InternalError
from overfill.kv.cache import KvCache
from overfill.kv.handshake import KvIdentity
from overfill.kv.peers import PrefillPeer
from overfill.kv.receiver import PromptPull
from overfill.kv.spec import KvSpec, RopeSpec
from overfill.lab.bench.kv.raw_stream import pull_raw
from overfill.lab.bench.kv.sender import BLOCK_SIZE
from overfill.lab.bench.measurement import Measurement
from overfill.request.params import SamplingParams
from overfill.rpc.channel import open_channel
from overfill.rpc.constants import MAX_CHUNK_PAYLOAD, WIRE_VERSION
from overfill.v1 import decode_pb2, prefill_pb2

BOUNDS = {"kv_grpc": 0.85, "kv_shm": 2.0}
"""Lower limits for the rates of KV, as multiples of the raw stream's rate in the same round."""


async def measure(spec: KvSpec, tokens: int, *, streams: int, rounds: int) -> list[Measurement]:
    """Measures the raw stream, KV over gRPC and KV through shared memory, in turns, after a warm-up round.

    Args:
        tokens: Tokens in one transfer.
        streams: Data connections.

    Returns:
        Rates in GB/s and, for KV, also as multiples of the raw stream's rate in the same round.

    Raises:
        OverfillError: A transfer failed.
    """
    spec = replace(spec, rope=RopeSpec())  # no rotary embedding is applied
    async with AsyncExitStack() as stack:
        sender = ["overfill.lab.bench.kv.sender", *map(str, (spec.num_layers, spec.num_kv_heads, spec.head_dim))]
        address = await _start(stack, [*sender, spec.dtype, str(tokens)])
        executor = stack.enter_context(ThreadPoolExecutor(streams, "kv-in"))
        receiver = _Receiver(spec, address, tokens, streams, executor)
        stack.push_async_callback(receiver.close)
        await receiver.connect()
        raw_address = await _start(stack, ["overfill.lab.bench.kv.raw_stream"])
        gc.freeze()  # as in a worker
        channels = [open_channel(raw_address) for _ in range(streams)]
        for channel in channels:
            stack.push_async_callback(channel.close, None)
        kv_bytes = tokens * spec.token_bytes
        messages = max(1, kv_bytes // MAX_CHUNK_PAYLOAD)
        transfers: dict[str, Callable[[], Awaitable[int]]] = {
            "grpc_raw": lambda: pull_raw(channels, messages),
            "kv_grpc": lambda: receiver.pull(shared=False),
            "kv_shm": lambda: receiver.pull(shared=True),
        }
        rates: dict[str, list[float]] = {name: [] for name in transfers}
        for number in range(rounds + 1):
            for name, transfer in transfers.items():
                started = time.perf_counter()
                size = await transfer()
                if number:  # the first round opens connections and touches memory for the first time
                    rates[name].append(size / (time.perf_counter() - started))
    raw = rates["grpc_raw"]
    figures = [Measurement.median("grpc_raw", [rate / 1e9 for rate in raw], "GB/s")]
    for name, bound in BOUNDS.items():
        ratios = [rate / raw_rate for rate, raw_rate in zip(rates[name], raw, strict=True)]
        figures.append(Measurement.median(name, ratios, "of grpc_raw", bound, at_least=True))
        gigabytes = [rate / 1e9 for rate in rates[name]]
        figures.append(
            Measurement.median(f"{name}_rate", gigabytes, "GB/s", peer="grpc_raw", peer_value=figures[0].value)
        )
    return figures


class _Receiver:
    """The receiving side of a decode worker, connected to the sender over gRPC and through shared memory."""

    def __init__(self, spec: KvSpec, address: str, tokens: int, streams: int, executor: ThreadPoolExecutor) -> None:
        self._spec = spec
        self._prompt = [0] * tokens
        self._executor = executor
        self._blocks = list(range(-(-tokens // BLOCK_SIZE)))
        self._cache = KvCache(spec, len(self._blocks), BLOCK_SIZE, torch.device("cpu"))
        target = decode_pb2.AssignPrefill(worker_id="bench", address=address)
        self._connections = {shared: PrefillPeer(target, streams, None, shm=shared) for shared in (False, True)}

    async def connect(self) -> None:
        for connection in self._connections.values():
            await connection.handshake(KvIdentity(WIRE_VERSION, "", "", self._spec))

    async def pull(self, shared: bool) -> int:
        """Receives one handoff. Returns the number of KV bytes received."""
        request = prefill_pb2.StartPrefill(
            request_id="bench", prompt_token_ids=self._prompt, sampling=SamplingParams(temperature=0).to_proto()
        )
        layers = range(self._spec.num_layers)
        pull = PromptPull(
            self._connections[shared], request, self._spec, layers, self._cache, self._blocks, self._executor
        )
        await pull.run(None, lambda token: None)
        if pull.stats.broken_streams or (pull.stats.shared_bytes > 0) != shared:
            raise InternalError(f"the transfer broke or used the wrong path (shared={shared}): {pull.stats}")
        return pull.stats.kv_bytes

    async def close(self) -> None:
        for connection in self._connections.values():
            await connection.close()


async def _start(stack: AsyncExitStack, module: list[str]) -> str:
    """Starts a module that prints its address; it runs until ``stack`` closes. Returns the address."""
    process = await asyncio.create_subprocess_exec(sys.executable, "-m", *module, stdout=asyncio.subprocess.PIPE)

    async def end() -> None:
        process.terminate()
        await process.wait()

    stack.push_async_callback(end)
    assert process.stdout is not None
    address = (await process.stdout.readline()).decode().strip()
    if not address:
        raise InternalError(f"{module[0]} did not start")
    return address

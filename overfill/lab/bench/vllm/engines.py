"""The engines of a run: full model and decoder behind a router of ours, and each alone in plain vLLM.

Two routers share one prefill worker. One has a decode worker with the decoder. The other has one with the full model,
which is "the full model under our workers". All engines are open together and take turns.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
import urllib.request
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from overfill.client import Answer, AsyncClient, Client, SamplingParams
from overfill.errors import InternalError
from overfill.kv.spec import DTypeName
from overfill.lab.cpu_clock import cpu_seconds
from overfill.lab.peers.process import JsonProcess
from overfill.lab.bench.vllm.window import DecodeWindow, decode_window
from overfill.model.manifest import Pair
from overfill.stack.child import Child
from overfill.stack.describe import describe
from overfill.stack.placed import PlacedStack, place
from overfill.stack.ports import free_ports
from overfill.stack.process_runner import child_environment, running

Log = Callable[[str, str], None]

_PLAIN_ENVIRONMENT = {
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # as in our workers
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}
_PROMPT_TOKENS_COMPUTED = "overfill_decode_prompt_tokens_computed_total"


@dataclass(frozen=True, slots=True)
class VllmSettings:
    """Settings that all engines share.

    Attributes:
        device: ``auto``, ``cpu`` or ``cuda``, for our workers; plain vLLM has one device.
        threads: CPU threads of each engine.
        kv_memory: Bytes of each engine's KV cache.
        engine_args: Arguments of vLLM by name, for all engines.
    """

    dtype: DTypeName
    device: str
    threads: int
    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    kv_memory: int
    engine_args: Mapping[str, Any]


class StackEngine:
    """A decode worker behind a router of ours, measured by a client of the SDK.

    Args:
        address: The router's.
        prefill, decode: The workers' processes.
    """

    def __init__(self, address: str, prefill: Child, decode: Child) -> None:
        self.address = address
        self._prefill, self._decode = prefill.pid, decode.pid

    def decode(self, prompts: Sequence[list[int]], max_tokens: int, steps: int) -> DecodeWindow:
        """Tokens while all ``prompts`` are decoded; CPU time is the decode worker's."""

        async def run() -> DecodeWindow:
            async with AsyncClient(self.address) as client:
                streams = [_counts(client, prompt, max_tokens) for prompt in prompts]
                return await decode_window(streams, steps, lambda: cpu_seconds(self._decode))

        return asyncio.run(run())

    def answer(self, prompt: list[int], max_tokens: int) -> tuple[list[float], float, Answer]:
        """One answer: when each token arrived, CPU seconds of the prefill worker, and the answer."""

        async def run() -> tuple[list[float], float, Answer]:
            async with AsyncClient(self.address) as client:
                await client.models()  # connects
                before, start = cpu_seconds(self._prefill), time.perf_counter()
                times: list[float] = []
                stream = client.stream(prompt, sampling=_greedy(max_tokens))
                async with stream:
                    async for delta in stream:
                        times += [time.perf_counter() - start] * len(delta.token_ids)
                return times, cpu_seconds(self._prefill) - before, stream.answer

        return asyncio.run(run())


class PlainEngine(JsonProcess):
    """One model in plain vLLM, in a process of its own. The constructor starts the process and loads the model.

    Args:
        whole: Count CPU time of all of vLLM's processes, not of the one that computes.

    Raises:
        PeerFailed: vLLM did not start.
    """

    def __init__(self, name: str, model: Path, settings: VllmSettings, log: Path, whole: bool = False) -> None:
        environment = plain_environment(settings)
        super().__init__(name, [sys.executable, "-m", "overfill.lab.bench.vllm.plain"], environment, log)
        arguments = {
            "model": str(model),
            "dtype": settings.dtype,
            "max_model_len": settings.max_model_len,
            "max_num_seqs": settings.max_num_seqs,
            "max_num_batched_tokens": settings.max_num_batched_tokens,
            "kv_cache_memory_bytes": settings.kv_memory,
            "enable_prefix_caching": False,
            "skip_tokenizer_init": True,
            "disable_log_stats": True,
            **settings.engine_args,
        }
        try:
            self.ask("load", arguments=arguments, whole=whole)
        except BaseException:
            self.close()
            raise

    def decode(self, prompts: Sequence[list[int]], max_tokens: int, steps: int) -> DecodeWindow:
        """Tokens while all ``prompts`` are decoded."""
        found = self.ask("decode", prompts=prompts, max_tokens=max_tokens, steps=steps)
        return DecodeWindow(**found | {"before": tuple(found["before"])})

    def answer(self, prompt: list[int], max_tokens: int) -> tuple[list[float], float]:
        """One answer: when each token arrived, and CPU seconds."""
        found = self.ask("answer", prompt=prompt, max_tokens=max_tokens)
        return found["times"], found["cpu"]


def plain_environment(settings: VllmSettings) -> dict[str, str]:
    """Environment of a process with plain vLLM."""
    return child_environment(os.environ, settings.threads) | _PLAIN_ENVIRONMENT


@contextmanager
def two_stage_stack(pair: Pair, settings: VllmSettings, log: Log) -> Iterator[str]:
    """A stack of one prefill and one decode worker. Yields the router's address.

    Raises:
        StartFailed: a process exited.
    """
    plan = stack_plan(pair.folder, settings, free_ports("127.0.0.1", 1)[0])
    with running(plan, log):
        yield plan.addresses[0]


@contextmanager
def both_stacks(
    pair: Pair, identity: Path, settings: VllmSettings, log: Log
) -> Iterator[tuple[StackEngine, StackEngine]]:
    """Yields the decoder and the full model, each in a decode worker behind its router; one prefill worker feeds both.

    Args:
        identity: Folder of the pair whose halves are both the full model.

    Raises:
        StartFailed: a process exited.
    """
    ports = free_ports("127.0.0.1", 2)
    ours, full = stack_plan(pair.folder, settings, ports[0]), stack_plan(identity, settings, ports[1])
    joins = ours.join_addresses + full.join_addresses
    prefill = [replace(w, config=w.config.model_copy(update={"routers": joins})) for w in ours.of_stage("prefill")]
    of_full = [
        replace(w, config=w.config.model_copy(update={"worker_id": "decode-full"})) for w in full.of_stage("decode")
    ]
    plan = replace(ours, routers=ours.routers + full.routers, workers=(*prefill, *ours.of_stage("decode"), *of_full))
    with running(plan, log) as stack:
        first = stack.worker(prefill[0].id)
        workers = [stack.worker(decode.id) for decode in plan.of_stage("decode")]
        decoder, full_model = (
            StackEngine(address, first, worker) for address, worker in zip(plan.addresses, workers, strict=True)
        )
        yield decoder, full_model


def prompt_tokens_computed(address: str) -> float:
    """Prompt tokens that the decode workers of a router have computed, by their metric.

    Raises:
        InternalError: a worker does not export the metric.
    """
    with Client(address) as client:
        workers = [w.process for w in client.status().workers if w.process is not None and w.stage == "decode"]
    total = 0.0
    for worker in workers:
        with urllib.request.urlopen(f"http://{worker.metrics_address}/metrics", timeout=10) as response:
            lines = response.read().decode().splitlines()
        values = [line.split()[-1] for line in lines if line.startswith(_PROMPT_TOKENS_COMPUTED)]
        if not values:
            raise InternalError(f"{worker.id} does not export {_PROMPT_TOKENS_COMPUTED}")
        total += sum(map(float, values))
    return total


def stack_plan(folder: Path, settings: VllmSettings, port: int) -> PlacedStack:
    """A router on ``port``, a prefill and a decode worker, all on this machine and without prefix caches."""
    return place(
        describe(
            folder,
            port=port,
            threads=settings.threads,
            settings={
                "engine": "vllm",
                "engine_args": json.dumps(dict(settings.engine_args)),
                "dtype": settings.dtype,
                "device": settings.device,
                "max_num_seqs": settings.max_num_seqs,
                "max_num_batched_tokens": settings.max_num_batched_tokens,
                "max_model_len": settings.max_model_len,
                "kv_memory": settings.kv_memory,
                "prefix_cache": False,
                "log_level": "warning",
                "grace_period": 2,
            },
        )
    )


def _greedy(max_tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)


async def _counts(client: AsyncClient, prompt: list[int], max_tokens: int) -> AsyncGenerator[int, None]:
    count = 0
    stream = client.stream(prompt, sampling=_greedy(max_tokens))
    async with stream:
        async for delta in stream:
            count += len(delta.token_ids)
            yield count

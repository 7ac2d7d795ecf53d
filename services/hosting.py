"""Hosts an engine in a worker process, for both stages: loading, threads, logging, exit codes, the Hello."""

from __future__ import annotations

import asyncio
import json
import logging
import math
import os
import secrets
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any, NoReturn, Protocol

import torch

from overfill.engine.device import cpu_settings, resolve_device, use_device
from overfill.engine.load import load_engine
from overfill.engine.protocol import EngineCore, EngineOptions, LoadedEngine, ServedHalf
from overfill.engine.sequence import EngineLoad
from overfill.engine.thread import EngineThread
from overfill.errors import OverfillError
from overfill.kv.keys import PromptBlocks
from overfill.model.manifest import Half, Pair
from overfill.model.native.library import unavailable_reason
from overfill.model.sampling import SampledToken
from overfill.pair.store import resolve_pair
from overfill.process import startup
from overfill.process.cores import SharedCores
from overfill.process.leaving import exit_now
from overfill.rpc.constants import WIRE_VERSION
from overfill.rpc.metrics_http import MetricsServer
from overfill.rpc.server import RpcServer
from overfill.rpc.tls import TlsError
from overfill.rpc.worker import WorkerHandle, WorkerHost
from overfill.settings.config import DecodeConfig, PrefillConfig, WorkerConfig
from overfill.telemetry import logs, tracing
from overfill.telemetry.metrics import EngineMetrics
from overfill.telemetry.progress import log_steps
from overfill.v1 import common_pb2, decode_pb2, registry_pb2
from overfill.version import __version__

logger = logging.getLogger(__name__)

_CUDA_STEP_TIMEOUT = 60.0
"""Default of ``step_timeout`` on CUDA, in seconds. There is none on the CPU, which cannot hang and may be slow."""

OnReady = Callable[[WorkerHost], object]
"""Called with the worker's host once the worker serves."""


async def load_half_of(config: WorkerConfig, half: Half) -> LoadedEngine:
    """Loads and warms the ``half`` of ``config.pair`` that a worker runs, in a thread. Checks the digests."""
    options = EngineOptions(
        device=resolve_device(config.device),
        dtype=config.dtype,
        block_size=config.block_size,
        kv_memory=config.kv_memory,
        max_model_len=config.max_model_len,
        max_num_seqs=config.max_num_seqs,
        prefix_cache=config.prefix_cache == "on",
        threads=config.threads,
        engine_args=json.loads(config.engine_args or "{}"),
    )
    if isinstance(config, PrefillConfig):
        options = replace(options, max_num_batched_tokens=config.max_num_batched_tokens)
    if isinstance(config, DecodeConfig):
        options = replace(options, kv_cache_dtype=config.kv_cache_dtype)

    def load() -> LoadedEngine:
        use_device(options.device)
        with startup.once():
            folder = resolve_pair(config.pair, log_steps(logger))
        pair = Pair.load(folder, check_digests=True)
        if isinstance(config, DecodeConfig) and config.quantize is not None:
            pair = pair.with_quantize(config.quantize)
        return load_engine(config.engine, pair, half, options)

    # The thread ends with the loading. If it lived on, OpenMP would count its idle team beside that of the engine's
    # thread as more threads than there are cores, and let threads sleep at each barrier: 10 ms per step on two cores.
    with ThreadPoolExecutor(1, "load") as loading:
        return await asyncio.get_running_loop().run_in_executor(loading, load)


def new_hello(worker_id: str, served: ServedHalf, tier: str = "") -> registry_pb2.Hello:
    """Creates a worker's Hello with a new incarnation. The host fills in the addresses once it listens.

    Args:
        tier: tier of a decode worker; empty means the only one of the stack.
    """
    prefills = served.half == "full"
    kind = "prefill" if prefills else "decode"
    return registry_pb2.Hello(
        worker_id=worker_id or f"{kind}-{socket.gethostname()}-{secrets.token_hex(2)}",
        incarnation=secrets.randbits(63),
        stages=[common_pb2.STAGE_PREFILL if prefills else common_pb2.STAGE_DECODE],
        wire_version=WIRE_VERSION,
        software_version=__version__,
        model=served.model_identity,
        kv=served.kv.to_proto(),
        max_model_len=served.max_model_len,
        vocab_size=served.config.vocab_size,
        pid=os.getpid(),
        engine=served.engine_version,
        tier=tier,
    )


def worker_load(load: EngineLoad, block_size: int) -> decode_pb2.WorkerLoad:
    """Converts an engine's load to its message."""
    return decode_pb2.WorkerLoad(
        kv_blocks_used=load.blocks_used,
        kv_blocks_total=load.blocks_total,
        running=load.running,
        waiting=load.waiting,
        block_size=block_size,
        queued_tokens=load.queued_tokens,
        kv_blocks_cached=load.blocks_cached,
        prefix_tokens_looked_up=load.prefix_tokens_looked_up,
        prefix_tokens_found=load.prefix_tokens_found,
    )


class PromptHasher:
    """Computes the prefix-cache keys of prompts on a thread of its own, so that the event loop stays free.

    It does not use asyncio's default executor, where prompts would wait behind grammars that are being compiled.

    Args:
        blocks_of: the engine's way to hash a prompt, as in ``ServedHalf``.
    """

    def __init__(self, blocks_of: Callable[[Sequence[int], str], PromptBlocks]) -> None:
        self._blocks_of = blocks_of
        self._executor = ThreadPoolExecutor(1, "hash")

    async def blocks_of(self, prompt: Sequence[int], namespace: str) -> PromptBlocks:
        """Returns the blocks of ``prompt`` with their keys; prompts share KV within one ``namespace`` only."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._executor, self._blocks_of, prompt, namespace)


def run_worker_process(serve: Coroutine[Any, Any, int], config: WorkerConfig) -> NoReturn:
    """Runs ``serve`` as the whole process. An expected failure prints one line to stderr and exits with code 1.

    Until ``serve`` handles SIGTERM and SIGINT itself, they end the process at once with exit code 0: it holds no
    requests yet, and a thread that loads a model cannot be interrupted.

    The process exits when ``serve`` returns, so ``serve`` must do all cleaning up.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: os._exit(0))
    logs.configure(config.log_level, config.log_format, each_request=config.log_requests == "on")
    with cpu_settings(config.threads):
        asyncio.run(_serve_and_exit(serve, config))
    raise AssertionError("the process has ended")


async def _serve_and_exit(serve: Coroutine[Any, Any, int], config: WorkerConfig) -> NoReturn:
    code = 1
    try:
        config.check_files()
        code = await serve
    except (OverfillError, TlsError) as error:
        print(f"error: {error}", file=sys.stderr)
    except torch.OutOfMemoryError as error:
        print(f"error: {str(error).splitlines()[0]}; give a smaller --kv-memory or --max-num-seqs", file=sys.stderr)
    except Exception:
        traceback.print_exc()
    exit_now(code)


class EngineServicer(Protocol):
    """The stage's servicer, as ``serve_engine`` uses it. ``serve_engine`` sets ``engine`` and ``host``."""

    engine: EngineThread
    host: WorkerHost

    @property
    def active(self) -> int: ...

    def end_all(self, error: OverfillError) -> None: ...


def _shared_cores(config: WorkerConfig, device: torch.device) -> SharedCores | None:
    """Returns None unless the native kernels run: in torch, a change of the number of threads is expensive."""
    if config.shared_cores is None or device.type != "cpu" or config.engine == "vllm" or unavailable_reason():
        return None
    return SharedCores(config.shared_cores, config.threads)


async def serve_engine(
    config: WorkerConfig,
    hello: registry_pb2.Hello,
    served: ServedHalf,
    core: EngineCore,
    servicer: EngineServicer,
    add_servicer: Callable[[Any, Any], None],
    service: str,
    metrics: EngineMetrics,
    codec: common_pb2.KvCodec = common_pb2.KV_CODEC_UNSPECIFIED,
    on_ready: OnReady = lambda host: None,
) -> int:
    """Runs ``core`` on its thread and ``servicer`` on the network until drained; returns the exit code.

    Args:
        add_servicer, service: arguments of ``RpcServer.add``.
        metrics: metrics to serve on a separate port, unless ``config.metrics_port`` is ``off``.
        codec: encoding in which a decode worker requests KV.
        on_ready: called with the host once the worker serves.
    """
    if any(router.startswith("ray:///") for router in config.routers):
        import overfill.cluster.directory  # noqa: F401  # registers the resolver of ray:/// names
    tracing.configure(config.program, hello.worker_id, __version__, config.trace_endpoint())
    loop, device = asyncio.get_running_loop(), served.device
    engine = EngineThread(
        core,
        f"{service}-engine",
        config.threads,
        config.step_timeout or (_CUDA_STEP_TIMEOUT if device.type == "cuda" else None),
        # Exit at once: an orderly shutdown might wait for the stuck device. Peers see their connections break.
        on_stuck=lambda: os._exit(1),
        on_load_change=lambda freed: loop.call_soon_threadsafe(partial(servicer.host.notify, debounce=not freed)),
        device=device,
        cores=_shared_cores(config, device),
    )
    server = RpcServer(config.server_tls(), config.max_rpcs, access=config.access())
    server.add(add_servicer, servicer, service)
    worker = WorkerHandle(
        load=lambda: worker_load(engine.load, served.store.block_size),
        active=lambda: servicer.active,
        end_all=servicer.end_all,
        capacity=config.max_num_seqs,
        healthy=lambda: engine.alive,
        codec=codec,
        prefix_keys=served.prefix_keys,
    )
    host = WorkerHost(
        server, hello, worker, config.routers, config.credentials(), config.grace_period, config.advertise
    )
    servicer.engine, servicer.host = engine, host
    exporter = None
    if config.metrics_port != "off":
        metrics.watch(lambda: engine.load)
        exporter = MetricsServer(
            metrics.registry,
            config.metrics_host,
            config.metrics_port,
            config.server_tls(),
            access=config.metrics_access(),
        )
        hello.metrics_address = exporter.address
    engine.start()
    try:
        startup.freeze()
        code = await host.run(f"{config.host}:{config.port}", on_ready)
    finally:
        engine.stop()
        if exporter is not None:
            exporter.close()
        await tracing.flush()
    return code if engine.failure is None else 1


def logprobs_to_proto(token: SampledToken) -> common_pb2.TokenLogprobs | None:
    """Converts a token's log-probabilities; returns None unless the request asked for them."""
    if token.logprob is None:
        return None
    # Leave out tokens that a grammar rules out: their log-probability is -inf.
    top = [(id, value) for id, value in token.top or [] if value != -math.inf]
    return common_pb2.TokenLogprobs(
        logprob=token.logprob,
        top_ids=[id for id, _ in top],
        top_logprobs=[value for _, value in top],
    )

"""Hosts an engine in a worker process, whatever its stages: loading, threads, logging, exit codes, the Hello."""

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
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NoReturn, Protocol, TypeVar

import torch

from overfill.engine.device import cpu_settings, resolve_device, use_device
from overfill.engine.load import LoadedColocated, load_colocated, load_engine
from overfill.engine.protocol import EngineCore, EngineOptions, LoadedEngine, ServedHalf
from overfill.engine.sequence import EngineLoad
from overfill.engine.thread import EngineThread
from overfill.errors import OverfillError
from overfill.kv.keys import PromptBlocks
from overfill.model.manifest import Half, Pair
from overfill.model.sampling import SampledToken
from overfill.pair.store import resolve_pair
from overfill.process import startup
from overfill.process.leaving import exit_now
from overfill.rpc.constants import WIRE_VERSION
from overfill.rpc.metrics_http import MetricsServer
from overfill.rpc.server import RpcServer
from overfill.rpc.tls import TlsError
from overfill.rpc.worker import WorkerHandle, WorkerHost
from overfill.settings.config import ColocatedConfig, DecodeConfig, PrefillConfig, WorkerConfig
from overfill.telemetry import logs, tracing
from overfill.telemetry.metrics import EngineMetrics
from overfill.telemetry.progress import log_steps
from overfill.v1 import common_pb2, decode_pb2, registry_pb2
from overfill.version import __version__

logger = logging.getLogger(__name__)

_CUDA_STEP_TIMEOUT = 60.0
"""Default of ``step_timeout`` on CUDA, in seconds. There is none on the CPU, which cannot hang and may be slow."""

_STAGES = {"full": common_pb2.STAGE_PREFILL, "decoder": common_pb2.STAGE_DECODE}
_KINDS = {"full": "prefill", "decoder": "decode"}
_Loaded = TypeVar("_Loaded")

OnReady = Callable[[WorkerHost], object]
"""Called with the worker's host once the worker serves."""


async def load_half_of(config: WorkerConfig, half: Half) -> LoadedEngine:
    """Loads and warms the ``half`` of ``config.pair`` that a worker runs, in a thread. Checks the digests."""
    options = engine_options(config, half)
    return await _in_thread(options, lambda: load_engine(config.engine, _load_pair(config), half, options))


async def load_both_halves_of(config: ColocatedConfig) -> LoadedColocated:
    """Loads and warms both halves of ``config.pair``, as ``load_half_of`` does."""
    full, decoder = engine_options(config, "full"), engine_options(config, "decoder")
    return await _in_thread(full, lambda: load_colocated(_load_pair(config), full, decoder))


def engine_options(config: WorkerConfig, half: Half) -> EngineOptions:
    """Returns what a worker's settings say about the engine of ``half``."""
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
    if half == "full" and isinstance(config, PrefillConfig | ColocatedConfig):
        options = replace(options, max_num_batched_tokens=config.max_num_batched_tokens)
    if half == "decoder" and isinstance(config, DecodeConfig):
        options = replace(options, kv_cache_dtype=config.kv_cache_dtype)
    return options


def _load_pair(config: WorkerConfig) -> Pair:
    with startup.once():
        folder = resolve_pair(config.pair, log_steps(logger))
    pair = Pair.load(folder, check_digests=True)
    if isinstance(config, DecodeConfig) and config.quantize is not None:
        pair = pair.with_quantize(config.quantize)
    return pair


async def _in_thread(options: EngineOptions, load: Callable[[], _Loaded]) -> _Loaded:
    def run() -> _Loaded:
        use_device(options.device)
        return load()

    # The thread ends with the loading. If it lived on, OpenMP would count its idle team beside that of the engine's
    # thread as more threads than there are cores, and let threads sleep at each barrier: 10 ms per step on two cores.
    with ThreadPoolExecutor(1, "load") as loading:
        return await asyncio.get_running_loop().run_in_executor(loading, run)


def new_hello(worker_id: str, halves: Sequence[ServedHalf], tier: str = "") -> registry_pb2.Hello:
    """Creates a worker's Hello with a new incarnation. The host fills in the addresses once it listens.

    Args:
        halves: the halves that the worker runs, the full model first.
        tier: tier of a decode worker; empty means the only one of the stack.
    """
    last = halves[-1]  # with both halves, the decoder, whose identity names the full model too
    kind = "worker" if len(halves) > 1 else _KINDS[last.half]
    return registry_pb2.Hello(
        worker_id=worker_id or f"{kind}-{socket.gethostname()}-{secrets.token_hex(2)}",
        incarnation=secrets.randbits(63),
        stages=[_STAGES[served.half] for served in halves],
        wire_version=WIRE_VERSION,
        software_version=__version__,
        model=last.model_identity,
        kv=last.kv.to_proto(),
        max_model_len=min(served.max_model_len for served in halves),
        vocab_size=last.config.vocab_size,
        pid=os.getpid(),
        engine=last.engine_version,
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


class EnginePort(Protocol):
    """What a servicer sees of the engine's thread."""

    @property
    def load(self) -> EngineLoad: ...

    def send(self, message: object) -> None: ...


class EngineServicer(Protocol):
    """The servicer of a stage, as ``serve_stages`` uses it. ``serve_stages`` sets ``engine`` and ``host``."""

    engine: EnginePort
    host: WorkerHost

    @property
    def active(self) -> int: ...

    def end_all(self, error: OverfillError) -> None: ...


@dataclass(frozen=True, eq=False, slots=True)
class StageService:
    """The service of one stage of a worker process.

    Attributes:
        add, name: arguments of ``RpcServer.add``.
        metrics: metrics of the stage; the stages of a worker share one registry.
        close: releases what the stage holds besides requests.
    """

    served: ServedHalf
    servicer: EngineServicer
    add: Callable[[Any, Any], None]
    name: str
    metrics: EngineMetrics
    close: Callable[[], Awaitable[None]]


class _StagePort:
    """The engine's thread, of whose load a stage sees its own part."""

    def __init__(self, thread: EngineThread[Any], load: Callable[[], EngineLoad]) -> None:
        self.send = thread.send
        self._load = load

    @property
    def load(self) -> EngineLoad:
        return self._load()


def on_loop(on_events: Callable[[Sequence[Any]], None]) -> Callable[[Sequence[Any]], None]:
    """Returns a function that passes events from the engine's thread to ``on_events`` on this event loop."""
    loop = asyncio.get_running_loop()

    def emit(events: Sequence[Any]) -> None:
        loop.call_soon_threadsafe(on_events, events)

    return emit


async def serve_stages(
    config: WorkerConfig,
    hello: registry_pb2.Hello,
    core: EngineCore[Any],
    stages: Sequence[StageService],
    codec: common_pb2.KvCodec = common_pb2.KV_CODEC_UNSPECIFIED,
    on_ready: OnReady = lambda host: None,
) -> int:
    """Runs ``core`` on its thread and the stages' services on the network until drained; returns the exit code.

    Args:
        stages: the worker's only stage; or prefill and decode, with a core whose load is a ``ColocatedLoad``.
        codec: encoding in which a decode worker requests KV.
        on_ready: called with the host once the worker serves.
    """
    if any(router.startswith("ray:///") for router in config.routers):
        import overfill.cluster.directory  # noqa: F401  # registers the resolver of ray:/// names
    tracing.configure(config.program, hello.worker_id, __version__, config.trace_endpoint())
    loop, device = asyncio.get_running_loop(), stages[0].served.device
    engine = EngineThread(
        core,
        "engine",
        config.threads,
        config.step_timeout or (_CUDA_STEP_TIMEOUT if device.type == "cuda" else None),
        # Exit at once: an orderly shutdown might wait for the stuck device. Peers see their connections break.
        on_stuck=lambda: os._exit(1),
        on_load_change=lambda freed: loop.call_soon_threadsafe(partial(host.notify, debounce=not freed)),
        device=device,
    )
    server = RpcServer(config.server_tls(), config.max_rpcs, access=config.access())
    for stage in stages:
        server.add(stage.add, stage.servicer, stage.name)
    if len(stages) == 1:
        loads: list[Callable[[], EngineLoad]] = [lambda: engine.load]
    else:
        loads = [lambda: engine.load.prefill, lambda: engine.load.decode]

    def report(stage: StageService, load: Callable[[], EngineLoad]) -> Callable[[], decode_pb2.WorkerLoad]:
        return lambda: worker_load(load(), stage.served.store.block_size)

    def end_all(error: OverfillError) -> None:
        for stage in stages:
            stage.servicer.end_all(error)

    reports = [report(stage, load) for stage, load in zip(stages, loads, strict=True)]
    worker = WorkerHandle(
        load=reports[-1],
        active=lambda: sum(stage.servicer.active for stage in stages),
        end_all=end_all,
        capacity=config.max_num_seqs,
        healthy=lambda: engine.alive,
        codec=codec,
        prefix_keys=stages[0].served.prefix_keys,
        prefill_load=reports[0] if len(stages) > 1 else None,
    )
    host = WorkerHost(
        server, hello, worker, config.routers, config.credentials(), config.grace_period, config.advertise
    )
    exporter = None
    for stage, load in zip(stages, loads, strict=True):
        stage.servicer.engine, stage.servicer.host = _StagePort(engine, load), host
        stage.metrics.watch(load)
    if config.metrics_port != "off":
        exporter = MetricsServer(
            stages[0].metrics.registry,
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
        for stage in stages:
            await stage.close()
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

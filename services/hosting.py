"""What both kinds of worker process do around their engine: threads, logging, exit codes, self-description."""

from __future__ import annotations

import asyncio
import gc
import logging
import math
import os
import secrets
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any, NoReturn, Protocol

import torch

from overfill.engine.build import EngineParts, Half, build_engine_parts, resolve_device
from overfill.engine.device import cpu_settings, use_device
from overfill.engine.sequence import EngineLoad
from overfill.engine.thread import EngineCore, EngineThread
from overfill.errors import OverfillError
from overfill.kv.journal import KeyJournal
from overfill.model.manifest import Pair
from overfill.model.sampling import SampledToken
from overfill.pair.store import resolve_pair
from overfill.process import startup
from overfill.process.leaving import exit_now
from overfill.rpc.constants import WIRE_VERSION
from overfill.rpc.metrics_http import MetricsServer
from overfill.rpc.server import RpcServer
from overfill.rpc.tls import TlsError
from overfill.rpc.worker import WorkerHandle, WorkerHost
from overfill.settings.config import DecodeConfig, WorkerConfig
from overfill.telemetry import logs, tracing
from overfill.telemetry.metrics import EngineMetrics
from overfill.telemetry.progress import log_steps
from overfill.v1 import common_pb2, decode_pb2, registry_pb2
from overfill.version import __version__

logger = logging.getLogger(__name__)

_CUDA_STEP_TIMEOUT = 60.0
"""Seconds, unless ``step_timeout`` is given. A CPU cannot hang, and its steps may be long."""

OnReady = Callable[[WorkerHost], object]
"""Is told that a worker serves."""


async def load_parts(config: WorkerConfig, half: Half, warm_tokens: int) -> EngineParts:
    """The half of ``config.pair`` that a worker runs, digests checked, warm; loaded beside the event loop."""

    device = resolve_device(config.device)

    def load() -> EngineParts:
        use_device(device)
        with startup.once():
            folder = resolve_pair(config.pair, log_steps(logger))
        return build_engine_parts(
            Pair.load(folder, check_digests=True),
            half,
            dtype=config.dtype,
            device=device,
            block_size=config.block_size,
            kv_memory=config.kv_memory,
            max_model_len=config.max_model_len,
            warm_tokens=warm_tokens,
            max_num_seqs=config.max_num_seqs,
            kv_cache_dtype=config.kv_cache_dtype if isinstance(config, DecodeConfig) else "auto",
            cuda_graphs=isinstance(config, DecodeConfig) and config.cuda_graphs == "on",
        )

    return await asyncio.to_thread(load)


def new_hello(stage: common_pb2.Stage, worker_id: str, parts: EngineParts, half: Half) -> registry_pb2.Hello:
    """A worker's introduction; its addresses are filled in once it listens. The incarnation is new each time."""
    kind = "prefill" if stage == common_pb2.STAGE_PREFILL else "decode"
    return registry_pb2.Hello(
        worker_id=worker_id or f"{kind}-{socket.gethostname()}-{secrets.token_hex(2)}",
        incarnation=secrets.randbits(63),
        stage=stage,
        wire_version=WIRE_VERSION,
        software_version=__version__,
        model=parts.model_identity(half),
        kv=parts.kv.to_proto(),
        max_model_len=parts.max_model_len,
        vocab_size=parts.config.vocab_size,
        pid=os.getpid(),
    )


def worker_load(load: EngineLoad, block_size: int) -> decode_pb2.WorkerLoad:
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


def run_worker_process(serve: Coroutine[Any, Any, int], config: WorkerConfig) -> NoReturn:
    """Runs ``serve`` as the whole process. An expected failure is one clear line on stderr and exit code 1.

    Until ``serve`` handles SIGTERM and SIGINT itself, they end the process at once with exit code 0: it holds nothing
    that others wait for, and a thread that loads a model cannot be interrupted.

    The process ends with ``serve``: whatever has to happen at the end happens in there.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: os._exit(0))
    logs.configure(config.log_level, config.log_format, each_request=config.log_requests == "on")
    with cpu_settings(config.threads):
        asyncio.run(_to_the_exit(serve))
    raise AssertionError("the process has ended")


async def _to_the_exit(serve: Coroutine[Any, Any, int]) -> NoReturn:
    code = 1
    try:
        code = await serve
    except (OverfillError, TlsError) as error:
        print(f"error: {error}", file=sys.stderr)
    except torch.OutOfMemoryError as error:
        print(f"error: {str(error).splitlines()[0]}; give a smaller --kv-memory or --max-num-seqs", file=sys.stderr)
    except Exception:
        traceback.print_exc()
    exit_now(code)


class EngineServicer(Protocol):
    """A worker's own service, as its process sees it; ``engine`` and ``host`` are given to it before it serves."""

    engine: EngineThread
    host: WorkerHost

    @property
    def active(self) -> int: ...

    def end_all(self, error: OverfillError) -> None: ...


async def serve_engine(
    config: WorkerConfig,
    hello: registry_pb2.Hello,
    core: EngineCore,
    servicer: EngineServicer,
    add_servicer: Callable[[Any, Any], None],
    service: str,
    codec: common_pb2.KvCodec = common_pb2.KV_CODEC_UNSPECIFIED,
    prefix_keys: KeyJournal | None = None,
    metrics: EngineMetrics | None = None,
    on_ready: OnReady = lambda host: None,
) -> int:
    """Runs ``core`` on its thread and ``servicer`` on the network until drained; returns the exit code.

    Args:
        add_servicer, service: as ``RpcServer.add`` takes them.
        codec: encoding in which a decode worker asks for KV.
        prefix_keys: what a prefill worker's prefix cache holds.
        metrics: served on a port of their own, unless the configuration says no.
        on_ready: called once the worker serves, with what can drain it.
    """
    if any(router.startswith("ray:///") for router in config.routers):
        import overfill.cluster.directory  # noqa: F401  # which can look such names up
    tracing.configure(config.program, hello.worker_id, __version__, config.trace_endpoint())
    loop, device = asyncio.get_running_loop(), resolve_device(config.device)
    engine = EngineThread(
        core,
        f"{service}-engine",
        config.threads,
        config.step_timeout or (_CUDA_STEP_TIMEOUT if device.type == "cuda" else None),
        # At once: whatever would be orderly may wait for the device too. Peers see their connections break.
        on_stuck=lambda: os._exit(1),
        on_load_change=lambda roomier: loop.call_soon_threadsafe(partial(servicer.host.notify, passing=not roomier)),
        device=device,
    )
    server = RpcServer(config.server_tls(), config.max_rpcs, access=config.access())
    server.add(add_servicer, servicer, service)
    worker = WorkerHandle(
        load=lambda: worker_load(engine.load, config.block_size),
        active=lambda: servicer.active,
        end_all=servicer.end_all,
        capacity=config.max_num_seqs,
        healthy=lambda: engine.alive,
        codec=codec,
        prefix_keys=prefix_keys,
    )
    host = WorkerHost(
        server, hello, worker, config.routers, config.credentials(), config.grace_period, config.advertise
    )
    servicer.engine, servicer.host = engine, host
    exporter = None
    if metrics is not None and config.metrics_port != "off":
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
        # What is there now stays: the collector need not go through all of it again and again.
        gc.collect()
        gc.freeze()
        code = await host.run(f"{config.host}:{config.port}", on_ready)
    finally:
        engine.stop()
        if exporter is not None:
            exporter.close()
        await tracing.flush()
    return code if engine.failure is None else 1


def logprobs_to_proto(token: SampledToken) -> common_pb2.TokenLogprobs | None:
    """None unless log-probabilities were asked for."""
    if token.logprob is None:
        return None
    # What a grammar rules out has no probability.
    top = [(id, value) for id, value in token.top or [] if value != -math.inf]
    return common_pb2.TokenLogprobs(
        logprob=token.logprob,
        top_ids=[id for id, _ in top],
        top_logprobs=[value for _, value in top],
    )

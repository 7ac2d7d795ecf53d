"""Hosts an engine in a worker process with one stage or both: thread, servers, signals, exit codes."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
import traceback
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn, Protocol, TypeVar

from overfill.engine.device import cpu_settings, is_out_of_memory, on_cpu
from overfill.engine.protocol import EngineCore, ServedHalf
from overfill.engine.thread import EngineThread
from overfill.errors import OverfillError, Unavailable
from overfill.kv.journal import KeyJournal
from overfill.process import startup
from overfill.process.cores import SharedCores
from overfill.process.leaving import exit_now
from overfill.rpc.metrics_http import MetricsServer
from overfill.rpc.probes import ProbeServer
from overfill.rpc.server import RpcServer
from overfill.rpc.tls import TlsError
from overfill.rpc.worker import AdapterLoader, WorkerHandle, WorkerHost
from overfill.settings.config import WorkerConfig
from overfill.telemetry import logs, tracing
from overfill.telemetry.engine_load import EngineLoad
from overfill.telemetry.metrics import EngineMetrics
from overfill.v1 import common_pb2, decode_pb2, registry_pb2
from overfill.version import __version__
from services.loading import file_of_turns, torch_threads
from services.messages import worker_load

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

_STEP_TIMEOUT = 60.0
"""Default of ``step_timeout`` on CUDA and with several ranks, in seconds. One process on a CPU cannot hang and may be
slow, so it has none."""

_FIRST_STEP_TIMEOUT = 600.0
"""The same for an engine's first steps, which compile kernels for shapes that are new."""

OnReady = Callable[[WorkerHost], object]
"""Called with the worker's host once the worker serves."""

_Config = TypeVar("_Config", bound=WorkerConfig)
_Serve = Callable[[_Config, OnReady], Coroutine[Any, Any, int]]


def run_worker_process(serve: _Serve[_Config], config: _Config) -> NoReturn:
    """Runs ``serve`` as the whole process. An expected failure prints one line to stderr and exits with code 1.

    Probes are served from before ``serve`` loads a model.

    Until ``serve`` handles SIGTERM and SIGINT itself, they end the process at once with exit code 0: it holds no
    requests yet, and a thread that loads a model cannot be interrupted.

    The process exits when ``serve`` returns, so ``serve`` must do all cleaning up.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: os._exit(0))
    logs.configure(config.log_level, config.log_format, each_request=config.log_requests)
    with cpu_settings(torch_threads(config)):
        asyncio.run(_serve_and_exit(serve, config))
    raise AssertionError("the process has ended")


async def _serve_and_exit(serve: _Serve[_Config], config: _Config) -> NoReturn:
    code = 1
    try:
        config.check_files()
        probes = None
        if config.probe_port != "off":  # before the model is loaded, which takes minutes
            probes = ProbeServer(config.probe_host, config.probe_port, config.server_tls())

        def on_ready(host: WorkerHost) -> None:
            if probes is not None:
                probes.follow(host.unready)

        code = await serve(config, on_ready)
    except (OverfillError, TlsError) as error:
        print(f"error: {error}", file=sys.stderr)
    except Exception as error:
        if is_out_of_memory(error):
            print(f"error: {str(error).splitlines()[0]}; give a smaller --kv-memory or --max-num-seqs", file=sys.stderr)
        else:
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
        on_drain: called once when the worker begins to drain.
        adapters: changes the adapters of a decoder; None means that it has none.
        disk_keys: keys of the KV on disk of a stage that prefills; None means that there is none.
        costs: returns what KV costs a stage that prefills; None means that it is not reported.
        kv_disk_bytes: returns the bytes of KV that the stage has on disk.
    """

    served: ServedHalf
    servicer: EngineServicer
    add: Callable[[Any, Any], None]
    name: str
    metrics: EngineMetrics
    close: Callable[[], Awaitable[None]]
    on_drain: Callable[[], None] = lambda: None
    adapters: AdapterLoader | None = None
    disk_keys: KeyJournal | None = None
    costs: Callable[[], registry_pb2.KvCosts] | None = None
    kv_disk_bytes: Callable[[], int] = lambda: 0


def _step_timeouts(
    setting: float | None, device: torch.device | None, *, ranks: bool
) -> tuple[float | None, float | None]:
    """Returns the limits of a step and of an engine's first steps, in seconds."""
    if setting is not None or (on_cpu(device) and not ranks):
        return setting, setting
    return _STEP_TIMEOUT, _FIRST_STEP_TIMEOUT


class _StagePort:
    """The engine's thread, of whose load a stage sees its own part."""

    def __init__(self, thread: EngineThread, load: Callable[[], EngineLoad]) -> None:
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
    core: EngineCore,
    stages: Sequence[StageService],
    codec: common_pb2.KvCodec = common_pb2.KV_CODEC_UNSPECIFIED,
    on_ready: OnReady = lambda host: None,
) -> int:
    """Runs ``core`` on its thread and the stages' services on the network until drained; returns the exit code.

    Args:
        stages: the worker's only stage; or prefill and decode, with a core whose load has both.
        codec: encoding in which a decode worker requests KV.
        on_ready: called with the host once the worker serves.
    """
    if any(router.startswith("ray:///") for router in config.routers):
        import overfill.stack.ray.directory  # noqa: F401  # registers the resolver of ray:/// names
    tracing.configure(config.program, hello.worker_id, __version__, config.trace_endpoint())
    loop, device = asyncio.get_running_loop(), stages[0].served.device
    file = file_of_turns(config)
    cores = None if file is None else SharedCores(file)
    ranks = stages[0].served.ranks is not None
    step_timeout, first_step_timeout = _step_timeouts(config.step_timeout, device, ranks=ranks)
    changed = False  # a change of the load was told to the loop, and no report has it yet

    def on_load_change(freed: bool) -> None:
        nonlocal changed
        if freed or not changed:  # waking the loop for each step that takes a block would cost as much as the tokens
            changed = True
            loop.call_soon_threadsafe(partial(host.notify, debounce=not freed))

    engine = EngineThread(
        core,
        "engine",
        torch_threads(config),
        step_timeout,
        # Exit at once: an orderly shutdown might wait for the stuck device. Peers see their connections break.
        on_stuck=lambda: os._exit(1),
        on_load_change=on_load_change,
        device=device,
        cores=cores or nullcontext(),
        first_step_timeout=first_step_timeout,
    )
    server = RpcServer(config.server_tls(), config.max_rpcs, access=config.access())
    for stage in stages:
        server.add(stage.add, stage.servicer, stage.name)
    loads: list[Callable[[], EngineLoad]] = [lambda: engine.load.prefill or engine.load, lambda: engine.load]
    loads = loads[-len(stages) :]

    def report(stage: StageService, load: Callable[[], EngineLoad]) -> Callable[[], decode_pb2.WorkerLoad]:
        def current() -> decode_pb2.WorkerLoad:
            nonlocal changed
            changed = False  # first: a change after it is told again
            return worker_load(load(), stage.served.store.block_size, stage.kv_disk_bytes())

        return current

    def end_all(error: OverfillError) -> None:
        for stage in stages:
            stage.servicer.end_all(error)

    def on_drain() -> None:
        for stage in stages:
            stage.on_drain()

    reports = [report(stage, load) for stage, load in zip(stages, loads, strict=True)]
    worker = WorkerHandle(
        load=reports[-1],
        active=lambda: sum(stage.servicer.active for stage in stages),
        end_all=end_all,
        capacity=config.max_num_seqs,
        healthy=lambda: engine.alive,
        codec=codec,
        prefix_keys=stages[0].served.prefix_keys,
        disk_keys=stages[0].disk_keys,
        costs=stages[0].costs,
        prefill_load=reports[0] if len(stages) > 1 else None,
        on_drain=on_drain,
        adapters=stages[-1].adapters,
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
        for stage in stages:
            if stage.served.ranks is not None:
                with suppress(Unavailable):  # a lost rank serves nothing more
                    await stage.served.ranks.stop()
        engine.stop()
        if exporter is not None:
            exporter.close()
        for stage in stages:
            stage.served.grammars.close()
            await stage.close()
        if cores is not None:
            cores.close()
        await tracing.flush()
    return code if engine.failure is None else 1

"""``overfill up``: runs a stack in the foreground, on Ray Serve or as plain processes.

``up_plan`` plans the processes; ``ray_stack`` or ``stack`` runs them.
"""

from __future__ import annotations

import contextlib
import secrets
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from types import FrameType
from typing import IO, Any, Literal, Protocol

import click
from click.core import ParameterSource
from rich.console import Console

from overfill.cli.output import console
from overfill.cli.ports import check_ports
from overfill.cli.processes import Child
from overfill.cli.ray_stack import RayOptions, RayStack
from overfill.cli.stack import Stack
from overfill.cli.stack_plan import PlannedPool, StackPlan
from overfill.cli.up_config import OwnSettings
from overfill.cli.up_options import up_options
from overfill.cli.up_plan import StackRequest, make_plan
from overfill.cli.up_stages import count_workers
from overfill.cli.up_tiers import MAX, check_replaced, check_tiers_given, max_workers, resolve_tiers
from overfill.cli.welcome import welcome
from overfill.cluster.connection import check_installed
from overfill.engine.choice import FIRST_GPU, choose_engine, require_vllm
from overfill.model.manifest import Half, Pair
from overfill.process.extras import require
from overfill.settings.config import ColocatedConfig, DecodeConfig
from overfill.settings.tiers import TierSpec
from overfill.settings.values import EngineChoice

_WATCH_SECONDS = 0.5


@click.command("up", cls=OwnSettings)
@up_options
def up_command(
    colocated: int | None,
    prefill: int | None,
    decode: int | None,
    tiers: tuple[TierSpec, ...],
    routers: int,
    pair: str,
    port: int,
    http: int | Literal["off"],
    threads: int | None,
    on_ray: bool,
    address: str | None,
    name: str,
    worker_cpus: float | None,
    worker_gpus: float | None,
    max_prefill: int | None,
    max_decode: int | None,
    log_dir: Path | None,
    tls: Path | None,
    **settings: Any,
) -> int:
    """Run a stack: routers and workers.

    On one machine with at most one GPU, a worker has both stages, prefill and decode. --prefill and --decode start
    workers with one stage, and --colocated more of those with both. All three together make a mixed stack.

    The stack runs on Ray Serve, which replaces lost workers. With --max-prefill or --max-decode, the number of workers
    follows the load. Ray is started on this machine, unless --address names a cluster. With --no-ray, the stack runs as
    plain processes.

    With --decoder, repeated, the stack has several tiers: decoders of one full model, of which requests choose one.

    The command stays in the foreground. Ctrl-C or SIGTERM lets running requests finish and stops the stack.

    A service's settings can also be set in the file of --config, or as variables such as OVERFILL_PREFILL_BLOCK_SIZE.
    """
    mock = settings.get("engine") == "mock"
    require("server", "`overfill up`", "xxhash" if mock else "torch")  # its processes need them
    from overfill.pair.store import MOCK, resolve_pair
    from overfill.telemetry.progress import show_progress

    if mock and click.get_current_context().get_parameter_source("pair") is ParameterSource.DEFAULT:
        pair = MOCK

    if tiers:
        check_replaced("pair", "decode", "max_decode")
    else:
        check_tiers_given(settings)
    count = partial(
        count_workers, colocated, prefill, decode, bool(tiers),
        {**settings, "address": address, "max_prefill": max_prefill, "max_decode": max_decode},
    )  # fmt: skip
    chosen = count()
    with _secret(settings, tls) as settings, _port_group(routers, on_ray) as share_port:
        # Report wrong settings and ports in use before preparing a pair, which can take minutes.
        request = StackRequest(
            None if tiers else Path(pair), chosen.prefill, chosen.decode, routers, port, threads, settings, http,
            tls, share_port=share_port, tiers=tiers, colocated=chosen.colocated,
        )  # fmt: skip
        planned = make_plan(request)
        options = RayOptions(
            address=address,
            name=name,
            worker_cpus=worker_cpus,
            worker_gpus=worker_gpus,
            max_prefill=max_prefill,
            max_decode=max_decode,
            log_dir=None if log_dir is None else str(log_dir.absolute()),
        )
        _check_options(options, planned, on_ray)
        if address is None:  # on a joined cluster, processes may run on other machines
            check_ports(planned, metrics=not on_ray)
            if "vllm" in {worker.config.engine for worker in planned.workers}:
                require_vllm()
        with show_progress() as report:
            if tiers:
                request = replace(request, tiers=resolve_tiers(tiers, report))
            else:
                folder = resolve_pair(pair, report)
                chosen = count(folder)  # again, because only the pair tells whether vLLM can run it
                request = replace(
                    request, pair=folder, prefill=chosen.prefill, decode=chosen.decode, colocated=chosen.colocated
                )
        if chosen.why:
            _note(chosen.why)
        plan = make_plan(replace(request, apart=address is not None))
        if not mock:
            check_engines(plan, here=address is None)
        with _stop_signals() as stopping:
            if on_ray:
                return run(RayStack(plan, options, _note), stopping, console())
            with _log_sink(log_dir) as sink:
                return run(Stack(plan, sink), stopping, console())


def check_engines(plan: StackPlan, *, here: bool) -> None:
    """Raises the errors of ``choose_engine`` for both stages and every tier, such as UnsupportedModel for FP8 weights.

    Args:
        here: the workers run on this machine. Others may have other devices and packages: there each worker chooses.
    """
    for worker, stage in ((pool.config, stage) for pool in plan.pools for stage in pool.kind.stages):
        half: Half = "full" if stage == "prefill" else "decoder"
        engine: EngineChoice = "overfill" if isinstance(worker, ColocatedConfig) else worker.engine
        pair = Pair.load(Path(worker.pair))
        if isinstance(worker, DecodeConfig) and worker.quantize is not None:
            pair = pair.with_quantize(worker.quantize)
        if here:
            on_first_gpu = partial(_on_first_gpu, worker.device)
            choose_engine(engine, pair, half, on_first_gpu, has_args=bool(worker.engine_args))
        elif engine != "auto":
            pair.check_engine(half, engine)


def _on_first_gpu(device: str) -> bool:
    from overfill.engine.device import resolve_device  # imports torch, which takes seconds

    return str(resolve_device(device)) in FIRST_GPU


@contextlib.contextmanager
def _secret(settings: dict[str, Any], tls: Path | None) -> Iterator[dict[str, Any]]:
    """Adds a new secret to ``settings`` if there are API keys, but neither certificates nor a secret.

    Without it, the router could not tell the stack's workers from clients. The secret's file is on this machine only; a
    stack on several machines has certificates.
    """
    certain = tls is not None or settings.get("tls_ca") is not None
    if certain or settings.get("api_keys") is None or settings.get("stack_secret") is not None:
        yield settings
        return
    with tempfile.TemporaryDirectory(prefix="overfill-") as folder:  # other users cannot read it
        path = Path(folder) / "secret"
        path.touch(0o600)
        path.write_text(secrets.token_hex(32) + "\n", encoding="utf-8")
        yield settings | {"stack_secret": path}


@contextlib.contextmanager
def _port_group(routers: int, on_ray: bool) -> Iterator[Path | None]:
    """Yields a new folder through which the routers share their ports; None if each has its own.

    Routers on Ray have their own, because Ray may place them on several machines.
    """
    if routers == 1 or on_ray:
        yield None
        return
    with tempfile.TemporaryDirectory(prefix="overfill-") as folder:  # other users cannot read it
        yield Path(folder)


def _check_options(options: RayOptions, plan: StackPlan, on_ray: bool) -> None:
    """Raises click.UsageError for conflicting options, and RayUnavailable if Ray is needed but not installed."""
    maxima = {tier.name: max_workers(tier) for tier in plan.tiers}
    if not on_ray:
        defaults = asdict(RayOptions(log_dir=options.log_dir))
        given = [f"--{name.replace('_', '-')}" for name, value in asdict(options).items() if value != defaults[name]]
        given += [f"{MAX} of --decoder {name}" for name, maximum in maxima.items() if maximum is not None]
        if given:
            raise click.UsageError(f"--no-ray conflicts with {', '.join(given)}: remove one of them")
        return
    if plan.colocated and any(maximum is not None for maximum in maxima.values()):
        raise click.UsageError(
            f"--colocated conflicts with {MAX} of a --decoder: a stack of workers with both stages has a fixed number "
            "of workers; remove one of them"
        )
    on_cuda = not plan.mock and any(pool.config.device.startswith("cuda") for pool in plan.pools)
    if on_cuda and options.address is not None and not options.worker_gpus:
        raise click.UsageError(
            "--device cuda needs --worker-gpus with --address: a worker sees no GPU unless it reserves one; give "
            "--worker-gpus 1, or a fraction for workers that share a GPU"
        )
    check_installed()
    for maximum, minimum, stage in (
        (options.max_prefill, len(plan.prefill), "prefill"),
        (options.max_decode, len(plan.decode), "decode"),
    ):
        if maximum is not None and maximum < minimum:
            raise click.UsageError(f"--max-{stage} {maximum} is less than --{stage} {minimum}: give at least {minimum}")


class AnyStack(Protocol):
    """Interface of a stack, of plain processes or on Ray."""

    plan: StackPlan

    @property
    def addresses(self) -> tuple[str, ...]: ...

    @property
    def reachable(self) -> bool: ...

    def start(self) -> None: ...

    def describe_workers(self, pool: PlannedPool) -> str: ...

    def wait_ready(self, cancelled: threading.Event) -> None: ...

    def news(self) -> list[str]: ...

    def stop(self) -> list[Child]: ...


def run(stack: AnyStack, stopping: threading.Event, out: Console) -> int:
    """Starts the stack, prints a summary, watches the stack until ``stopping``, stops it. Returns the exit code."""
    try:
        stack.start()
        stack.wait_ready(stopping)
        if not stopping.is_set():
            welcome(out, stack.plan, stack.addresses, stack.describe_workers)
        while not stopping.wait(_WATCH_SECONDS):
            for line in stack.news():
                _note(line)
            if not stack.reachable:
                click.echo("overfill: no router is running any more; stopping", err=True)
                return 1
        click.echo("overfill: stopping after running requests finish (ctrl-C again to kill)", err=True)
        return 0
    finally:
        for child in stack.stop():
            click.echo(f"overfill: {child.name} did not stop in time and was killed", err=True)


def _note(line: str) -> None:
    click.echo(f"overfill: {line}", err=True)


@contextlib.contextmanager
def _stop_signals() -> Iterator[threading.Event]:
    """Yields an event that the first SIGINT, SIGTERM or SIGHUP sets; a second one raises KeyboardInterrupt."""
    stopping = threading.Event()

    def handle(number: int, frame: FrameType | None) -> None:
        if stopping.is_set():
            raise KeyboardInterrupt
        stopping.set()

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield stopping
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _log_sink(folder: Path | None) -> Iterator[Callable[[str, str], None]]:
    """Yields a function that writes a process's line to stderr with a prefix, or to ``folder/PROCESS.log``."""
    if folder is None:
        yield lambda name, line: print(f"{name} | {line}", file=sys.stderr, flush=True)
        return
    folder.mkdir(parents=True, exist_ok=True)
    files: dict[str, IO[bytes]] = {}

    def write(name: str, line: str) -> None:
        with contextlib.suppress(OSError):  # a full disk must not stop the stack; it only loses lines
            if name not in files:
                files[name] = (folder / f"{name}.log").open("ab", buffering=0)
            files[name].write(f"{line}\n".encode())

    try:
        yield write
    finally:
        for file in files.values():
            file.close()

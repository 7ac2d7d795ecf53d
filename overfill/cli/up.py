"""``overfill up``: runs a stack in the foreground, on Ray Serve or as plain processes.

``up_plan`` plans the processes; ``ray_stack`` or ``stack`` runs them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import secrets
import shlex
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from types import FrameType
from typing import IO, Any, Literal, Protocol

import click
from rich.console import Console
from rich.rule import Rule
from rich.text import Text

from overfill.cli.answering import DEFAULT_MAX_TOKENS, DEFAULT_TEMPERATURE
from overfill.cli.output import console
from overfill.cli.processes import Child
from overfill.cli.ray_stack import RayOptions, RayStack
from overfill.cli.stack import Stack, StackPlan, check_ports
from overfill.cli.up_config import OwnSettings
from overfill.cli.up_options import up_options
from overfill.cli.up_plan import make_plan
from overfill.cluster.connection import check_installed
from overfill.engine.choice import choose_engine, require_vllm
from overfill.model.manifest import Half, Pair
from overfill.process.extras import require
from overfill.settings.config import WorkerConfig

_WATCH_SECONDS = 0.5
_BOX_WIDTH = 80  # characters, at most


@click.command("up", cls=OwnSettings)
@up_options
def up_command(
    prefill: int,
    decode: int,
    routers: int,
    pair: str,
    port: int,
    http: int | Literal["off"],
    threads: int | None,
    mock: bool,
    on_ray: bool,
    address: str | None,
    name: str,
    worker_cpus: float | None,
    worker_gpus: float | None,
    max_prefill: int | None,
    max_decode: int | None,
    ttft_objective: float | None,
    itl_objective: float | None,
    log_dir: Path | None,
    tls: Path | None,
    **settings: Any,
) -> int:
    """Run a stack: router, prefill workers and decode workers.

    The stack runs on Ray Serve, which replaces lost workers. With --max-prefill or --max-decode, the number of workers
    follows the load. Ray is started on this machine, unless --address names a cluster. With --no-ray, the stack runs as
    plain processes.

    The command stays in the foreground. Ctrl-C or SIGTERM lets running requests finish and stops the stack.

    A service's settings can also be set in the file of --config, or as variables such as OVERFILL_PREFILL_BLOCK_SIZE.
    The options --prefill, --decode, --router, --pair, --grpc, --http, --log-dir, --config, --mock and those for Ray are
    variables too, such as OVERFILL_UP_PREFILL and OVERFILL_UP_RAY=no.
    """
    require("server", "`overfill up`", "xxhash" if mock else "torch")  # its processes need them
    from overfill.pair.store import resolve_pair
    from overfill.telemetry.progress import show_progress

    with _secret(settings, tls) as settings, _port_group(routers, on_ray) as share_port:
        # Report wrong settings and ports in use before preparing a pair, which can take minutes.
        planned = make_plan(
            Path(pair), prefill, decode, routers, port, threads, settings, http, mock, tls, share_port=share_port
        )
        options = RayOptions(
            address=address,
            name=name,
            worker_cpus=worker_cpus,
            worker_gpus=worker_gpus,
            max_prefill=max_prefill,
            max_decode=max_decode,
            objectives={key: v for key, v in (("ttft", ttft_objective), ("itl", itl_objective)) if v is not None},
            log_dir=None if log_dir is None else str(log_dir.absolute()),
        )
        _check_options(options, prefill, decode, on_ray)
        if address is None:  # on a joined cluster, processes may run on other machines
            check_ports(planned, metrics=not on_ray)
            if not mock and "vllm" in {worker.engine for _, worker in planned.workers()}:
                require_vllm()
        with show_progress() as report:
            folder = resolve_pair(pair, report)
        plan = make_plan(
            folder, prefill, decode, routers, port, threads, settings, http, mock, tls, address is not None, share_port
        )
        if not mock:
            check_engines(plan, here=address is None)
        with _stop_signals() as stopping:
            if on_ray:
                return run(RayStack(plan, options, _note), stopping, console())
            with _log_sink(log_dir) as sink:
                return run(Stack(plan, sink), stopping, console())


def check_engines(plan: StackPlan, *, here: bool) -> None:
    """Raises the errors of ``choose_engine`` for both stages, such as UnsupportedModel for a pair with FP8 weights.

    Args:
        here: the workers run on this machine. Others may have other devices and packages: there each worker chooses.
    """
    halves: tuple[tuple[Half, WorkerConfig], ...] = (("full", plan.prefill[0]), ("decoder", plan.decode[0]))
    pair = Pair.load(Path(plan.routers[0].pair))
    for half, worker in halves:
        if here:
            on_cuda = partial(_on_cuda, worker.device)
            choose_engine(worker.engine, pair, half, on_cuda, has_args=bool(worker.engine_args))
        elif worker.engine != "auto":
            pair.check_engine(half, worker.engine)


def _on_cuda(device: str) -> bool:
    from overfill.engine.device import resolve_device  # imports torch, which takes seconds

    return resolve_device(device).type == "cuda"


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


def _check_options(options: RayOptions, prefill: int, decode: int, on_ray: bool) -> None:
    """Raises click.UsageError for conflicting options, and RayUnavailable if Ray is needed but not installed."""
    defaults = dataclasses.asdict(RayOptions(log_dir=options.log_dir, objectives={}))
    given = [name for name, value in dataclasses.asdict(options).items() if value != defaults[name]]
    if not on_ray:
        if given:
            flags = ", ".join(f"--{name.replace('_', '-')}" for name in given)
            raise click.UsageError(f"--no-ray conflicts with {flags}: remove one of them")
        return
    check_installed()
    for maximum, minimum, stage in ((options.max_prefill, prefill, "prefill"), (options.max_decode, decode, "decode")):
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

    def describe_workers(self, stage: str) -> str: ...

    def wait_ready(self, cancelled: threading.Event) -> None: ...

    def news(self) -> list[str]: ...

    def stop(self) -> list[Child]: ...


def run(stack: AnyStack, stopping: threading.Event, out: Console) -> int:
    """Starts the stack, prints a summary, watches the stack until ``stopping``, stops it. Returns the exit code."""
    try:
        stack.start()
        stack.wait_ready(stopping)
        if not stopping.is_set():
            _welcome(out, stack.plan, stack.addresses, stack.describe_workers)
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


def _welcome(out: Console, plan: StackPlan, addresses: Sequence[str], describe_workers: Callable[[str], str]) -> None:
    """Prints addresses, workers and example commands. A command stays on one line, so that it can be copied."""
    first = addresses[0]
    option = "" if first == "127.0.0.1:7600" else f" --address {first}"
    if plan.client_tls is not None:
        # A stack with a CA of its own also requires a client certificate.
        ca = plan.client_tls.ca
        option += " --tls-ca CA.pem" if ca is None else f" --tls-ca {ca} --tls-cert YOURS.pem --tls-key YOURS.key"
        option += f" --tls-name {plan.client_tls.name}" if plan.client_tls.name else ""
    # Not --api-key, because other users of the machine can see flags.
    key = "" if plan.routers[0].api_keys is None else "OVERFILL_API_KEY=YOURS "
    urls = plan.openai_urls(addresses)
    rows = [("gRPC", ", ".join(addresses))]
    if urls:
        rows.append(("OpenAI", ", ".join(urls)))
        rows.append(("page", ", ".join(url.removesuffix("/v1") + "/ui" for url in urls)))
    rows.append(("pair", plan.routers[0].pair))
    for stage, workers in (("prefill", plan.prefill), ("decode", plan.decode)):
        given = "".join(f"{text}, " for text in (workers[0].engine, workers[0].dtype) if text not in (None, "auto"))
        rows.append((stage, f"{describe_workers(stage)} ({given}CPU threads each: {workers[0].threads})"))
    rows.append(("try", f'{key}overfill generate{option} "Why is the sky blue?"'))
    rows.append(("", f"{key}overfill chat{option}"))
    rows.append(("", f"{key}overfill status{option}"))
    if urls and plan.client_tls is None:
        rows.append(("", _curl(plan, urls[0])))
    rows.append(("stop", "ctrl-C"))
    width = min(out.width, _BOX_WIDTH)
    out.print(Rule("OverFill is up", align="left"), width=width)
    for name, words in rows:
        out.print(Text(f"{name:<7}  {words}"), soft_wrap=True)
    out.print(Rule(), width=width)


def _curl(plan: StackPlan, base: str) -> str:
    body = {
        "model": plan.model,
        "messages": [{"role": "user", "content": "Why is the sky blue?"}],
        "max_tokens": DEFAULT_MAX_TOKENS,
        "temperature": DEFAULT_TEMPERATURE,
    }
    # Not -H, because other users of the machine can see it; curl hides this option.
    key = "" if plan.routers[0].api_keys is None else ' --oauth2-bearer "$OVERFILL_API_KEY"'
    return f"curl {base}/chat/completions{key} -H 'content-type: application/json' -d {shlex.quote(json.dumps(body))}"


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

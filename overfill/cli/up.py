"""``overfill up``: runs a stack in the foreground, on Ray Serve or as plain processes.

``overfill.stack`` describes the stack and runs it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import IO, Any

import click
from click.core import ParameterSource

from overfill.cli.options import check_replaced, option_errors
from overfill.cli.progress import show_progress
from overfill.cli.up_options import UpCommand, up_options
from overfill.cli.welcome import welcome
from overfill.engine.choice import require_vllm
from overfill.model.adapter import AdapterRecord
from overfill.pair.store import MOCK, NAMED, is_hub_id, resolve_pair
from overfill.process.extras import require
from overfill.settings.reader import BadSettings
from overfill.settings.tiers import TierSpec
from overfill.settings.worker_kinds import VARIABLE_PREFIXES
from overfill.stack.adapters import with_default_folder, with_modules
from overfill.stack.counts import count_workers
from overfill.stack.describe import RayPlacement, check_used, describe
from overfill.stack.pairs import check_engine_args, check_engines, resolve_pairs
from overfill.stack.placed import place
from overfill.stack.ports import check_ports
from overfill.stack.process_runner import ProcessRunner
from overfill.stack.ray.connection import check_installed
from overfill.stack.ray.runner import RayRunner
from overfill.stack.shared import check_gpus
from overfill.stack.spec import SUFFIXES, StackSpec

_WATCH_SECONDS = 0.5
_BESIDE_A_DOCUMENT = {"target", "dry_run", "on_ray"}


@click.command("up", cls=UpCommand)
@up_options
def up_command(
    target: str | None,
    dry_run: bool,
    pair: str | None,
    on_ray: bool,
    modules: dict[str, Path],
    **options: Any,
) -> int:
    """Run a stack: routers and workers.

    On one machine with at most one GPU, one colocated worker has both stages, prefill and decode. --prefill and
    --decode start workers with one stage, and --colocated more colocated ones. All three together make a mixed stack.

    The stack runs on Ray Serve, which replaces lost workers. With --max-prefill or --max-decode, the number of workers
    follows the load. Ray is started on this machine, unless --ray-address names a cluster. With --no-ray, the stack
    runs as plain processes.

    With --tier, repeated, the stack has several tiers: decoders of one full model, of which requests choose one.

    The argument is the pair to serve. If it ends in .yaml, .yml or .json, it is the document of a stack, as --dry-run
    prints it, and the command starts what the document says.

    The command stays in the foreground. Ctrl-C or SIGTERM lets running requests finish and stops the stack.

    A service's settings can also be set in the file of --config, or as variables such as OVERFILL_PREFILL_BLOCK_SIZE.
    """
    described = target is not None and target.endswith(SUFFIXES)
    with _usage_errors():
        if dry_run and modules:
            raise BadSettings(
                "--dry-run conflicts with --lora-modules: a document names a folder; add the adapters to one with "
                "`overfill pair adapter add`, and give --adapters"
            )
        if described:
            spec = _read(Path(target or ""), on_ray)
        else:
            spec = _describe(_pair(target, pair), on_ray, options, prepare=not dry_run)
    with option_errors():
        check_engine_args(spec)
        if not dry_run:
            _prepare(spec)
    if not described and not modules:
        spec = with_default_folder(spec, _note)
    if dry_run:
        click.echo(str(spec), nl=False)
        return 0
    with _stop_signals() as stopping, contextlib.ExitStack() as opened:
        sink = None
        if spec.runner == "processes":
            sink = opened.enter_context(_log_sink(None if spec.log_dir is None else Path(spec.log_dir)))
        with _usage_errors():
            spec, adapters = opened.enter_context(with_modules(spec, modules))
        stack = RayRunner(spec, _note) if sink is None else ProcessRunner(place(spec), sink)
        return run(stack, stopping, adapters)


@contextlib.contextmanager
def _usage_errors() -> Iterator[None]:
    """Turns BadSettings into click.UsageError."""
    try:
        yield
    except BadSettings as error:
        raise click.UsageError(str(error)) from error


def _pair(target: str | None, pair: str | None) -> str:
    """Returns the pair that the argument or the option names, a folder as an absolute path; empty if none does."""
    if target is not None and pair is not None:
        raise click.UsageError(f"the argument {target!r} conflicts with --pair {pair!r}: give one of them")
    named = target or pair
    return _absolute(named) if named else ""


def _absolute(pair: str) -> str:
    return pair if pair in (MOCK, *NAMED) or is_hub_id(pair) else os.path.abspath(pair)


def _is_given(name: str) -> bool:
    source = click.get_current_context().get_parameter_source(name)
    return source not in (ParameterSource.DEFAULT, None)


def _read(path: Path, on_ray: bool) -> StackSpec:
    """Reads a document. Raises BadSettings if it is wrong, or if something else sets what it describes."""
    given = [
        option.opts[0]
        for option in click.get_current_context().command.params
        if option.name not in _BESIDE_A_DOCUMENT and _is_given(option.name or "")
    ]
    given += sorted(name for name, value in os.environ.items() if value and name.startswith(VARIABLE_PREFIXES))
    if given:
        raise BadSettings(f"{path} describes the whole stack, so {', '.join(given)} has no effect: change the document")
    spec = StackSpec.load(path)
    return spec.on("ray" if on_ray else "processes") if _is_given("on_ray") else spec


def _describe(pair: str, on_ray: bool, options: dict[str, Any], *, prepare: bool) -> StackSpec:
    """Describes the stack of the options, and says why if it chooses the kinds of workers. Raises BadSettings.

    Args:
        prepare: prepare the pair if it is missing. Without it, ``up`` knows less of a pair when it chooses.
    """
    own = dict(options)
    tiers: tuple[TierSpec, ...] = own.pop("tiers")
    tiers = tuple(tier.model_copy(update={"pair": _absolute(tier.pair)}) for tier in tiers)
    colocated, prefill, decode = own.pop("colocated"), own.pop("prefill"), own.pop("decode")
    if tiers:
        check_replaced("pair", "decode", "max_decode")
        if _is_given("target"):
            raise BadSettings("--tier conflicts with the argument: each --tier names its own pair, as NAME=PAIR")
    else:
        _check_tiers_given(own)
    http, log_dir, routers, port = own.pop("http"), own.pop("log_dir"), own.pop("routers"), int(own.pop("port"))
    tls, revision = own.pop("tls"), own.pop("revision")
    placement = RayPlacement(
        own.pop("ray_address"),
        *(own.pop(n) for n in ("name", "worker_cpus", "worker_gpus", "max_prefill", "max_decode")),
    )
    _check_runner(placement, tiers, colocated, on_ray)

    def described(folder: Path | None) -> tuple[StackSpec, str]:
        chosen = count_workers(colocated, prefill, decode, bool(tiers), options, folder)
        spec = describe(
            pair,
            prefill=chosen.prefill,
            decode=chosen.decode,
            colocated=chosen.colocated,
            tiers=tiers,
            routers=routers,
            port=port,
            http="off" if http == "off" else int(http),
            share_port=not on_ray and routers > 1,
            settings=own,
            tls=tls,
            ray=placement if on_ray else None,
            log_dir=log_dir,
            revision=revision or "",
        )
        return spec, chosen.why

    # Reports wrong settings and ports in use before preparing a pair, which can take minutes.
    spec, why = described(None)
    if prepare:
        _check_here(spec)
    if not tiers and (prepare or Path(spec.pair).is_dir()):
        with show_progress() as report:
            spec, why = described(resolve_pair(spec.pair, report))
    check_used(spec, options["config"])
    if why:
        _note(why)
    return spec


def _check_here(spec: StackSpec) -> None:
    """Raises an error if a port is in use, or if Ray, vLLM or GPUs are missing that the stack needs."""
    require("server", "`overfill up`", "xxhash" if spec.mock else "torch")  # its processes need them
    if spec.runner == "ray":
        check_installed()
    if spec.joins_cluster:  # processes may run on other machines
        return
    check_ports(spec)
    check_gpus(spec)
    if "vllm" in {spec.worker_config(name).engine for name in spec.pools}:
        require_vllm()


def _prepare(spec: StackSpec) -> None:
    """Prepares the pairs, and raises an error if the stack cannot run here."""
    _check_here(spec)
    with show_progress() as report:
        prepared = resolve_pairs(spec, report)
    if not spec.mock:
        check_engines(prepared)


def _check_tiers_given(options: dict[str, Any]) -> None:
    """Raises BadSettings if a setting names tiers; call it for a stack without --tier."""
    for name in ("default_tier", "brownout"):
        if options.get(name):
            raise BadSettings(
                f"--{name.replace('_', '-')} {options[name]!r} names tiers, and the stack has none: add --tier "
                "NAME=PAIR for each tier"
            )


def _check_runner(placement: RayPlacement, tiers: tuple[TierSpec, ...], colocated: int | None, on_ray: bool) -> None:
    """Raises BadSettings for options that conflict with the runner."""
    scaled = [tier.name for tier in tiers if tier.max_replicas is not None]
    if not on_ray:
        names = ("ray_address", "name", "worker_cpus", "worker_gpus", "max_prefill", "max_decode")
        given = [f"--{name.replace('_', '-')}" for name in names if _is_given(name)]
        given += [f"max of --tier {name}" for name in scaled]
        if given:
            raise BadSettings(f"--no-ray conflicts with {', '.join(given)}: remove one of them")
    if colocated and scaled:
        raise BadSettings(
            "--colocated conflicts with max of a --tier: a stack of colocated workers has a fixed number of workers; "
            "remove one of them"
        )
    device = str(click.get_current_context().params.get("device") or "")
    if on_ray and device.startswith("cuda") and placement.ray_address is not None and not placement.worker_gpus:
        raise BadSettings(
            "--device cuda needs --worker-gpus with --ray-address: a worker sees no GPU unless it reserves one; give "
            "--worker-gpus 1, or a fraction for workers that share a GPU"
        )


def run(stack: ProcessRunner | RayRunner, stopping: threading.Event, adapters: Sequence[AdapterRecord] = ()) -> int:
    """Starts the stack, prints a summary, watches the stack until ``stopping``, stops it. Returns the exit code.

    Args:
        adapters: the adapters that decode workers load, for the summary.
    """
    try:
        stack.start()
        stack.wait_ready(stopping)
        if not stopping.is_set():
            click.echo(welcome(stack.spec, stack.addresses, stack.describe_workers, adapters))
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
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise click.UsageError(f"--log-dir {folder}: cannot be made: {error.strerror}") from error
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

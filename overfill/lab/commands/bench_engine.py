"""``overfill bench decode``, ``prefill`` and ``peers``: the engine against the machine and against other engines."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from overfill.cli.options import dtype_option
from overfill.cli.output import console

if TYPE_CHECKING:
    from overfill.kv.spec import DTypeName, KvCacheDtype
    from overfill.lab.bench.engine import Setting
    from overfill.lab.bench.rows import Row
    from overfill.model.config import Quantization
    from overfill.telemetry.progress import Report

_F = TypeVar("_F", bound=Callable[..., Any])


class _Counts(click.ParamType[tuple[int, ...]]):
    """``1,8,32``: positive whole numbers."""

    name = "numbers"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        try:
            numbers = tuple(int(part) for part in str(value).split(","))
        except ValueError:
            numbers = ()
        if not numbers or min(numbers) < 1:
            self.fail(f"{value!r} is not a list of numbers such as 1,8,32", param, ctx)
        return numbers


def _common_options(command: _F) -> _F:
    for option in (
        click.option("--json", "as_json", is_flag=True, help="A JSON line per figure on stdout."),
        click.option("--plot", type=click.Path(dir_okay=False, path_type=Path), help="Draw the figures to this file."),
        click.option("--rounds", type=click.IntRange(1), default=5, show_default=True, help="Turns of each engine."),
        click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N; of ours."),
        click.option("--threads", type=click.IntRange(1), help="CPU threads of each engine.  [default: the cores]"),
        dtype_option,
        click.option(
            "--peers",
            default="transformers,reference",
            show_default=True,
            help="transformers, reference, openvino, vllm; or all, or none.",
        ),
        click.option(
            "--pair", default="default", show_default=True, help="default, fast, identity, or a pair's folder."
        ),
    ):
        command = option(command)
    return command


@click.command("decode")
@_common_options
@click.option("--batch", "batches", type=_Counts(), default="1,8,32,64", show_default=True, help="Sequences at once.")
@click.option("--context", type=click.IntRange(2), default=512, show_default=True, help="Mean tokens per sequence.")
@click.option("--steps", type=click.IntRange(1), default=16, show_default=True, help="Decode steps in a turn.")
@click.option(
    "--quantize", type=click.Choice(["none", "int8"]), help="The decoder's matrices.  [default: as the pair says]"
)
@click.option(
    "--kv-cache-dtype",
    type=click.Choice(["auto", "int8"]),
    default="auto",
    show_default=True,
    help="How the decoder holds KV; with int8, --pair identity has a decoder too.",
)
def decode_command(
    pair: str,
    peers: str,
    dtype: DTypeName | None,
    threads: int | None,
    device: str,
    rounds: int,
    plot: Path | None,
    as_json: bool,
    batches: tuple[int, ...],
    context: int,
    steps: int,
    quantize: Quantization | None,
    kv_cache_dtype: KvCacheDtype,
) -> None:
    """Tokens per second while answers are written: full model and decoder, at each batch.

    The bound is what this machine allows: it is measured in the same run, in turns with the engines.
    """
    from overfill.lab.bench.engine import bench_decode
    from overfill.lab.bench.rounds import Plan

    def measure(report: Report) -> Iterator[Row]:
        setting = _setting(pair, peers, dtype, threads, device, quantize, Plan(rounds, steps), report)
        setting = replace(setting, kv_cache_dtype=kv_cache_dtype)
        return bench_decode(setting, batches, context, report)

    _print("decode, tokens/s", measure, plot, as_json)


@click.command("prefill")
@_common_options
@click.option("--context", "lengths", type=_Counts(), default="512,2048", show_default=True, help="Tokens per prompt.")
@click.option("--batch", "batches", type=_Counts(), default="1,4", show_default=True, help="Prompts at once.")
def prefill_command(
    pair: str,
    peers: str,
    dtype: DTypeName | None,
    threads: int | None,
    device: str,
    rounds: int,
    plot: Path | None,
    as_json: bool,
    lengths: tuple[int, ...],
    batches: tuple[int, ...],
) -> None:
    """Prompt tokens per second of the full model, for prompts read alone and several at once."""
    from overfill.lab.bench.engine import bench_prefill
    from overfill.lab.bench.rounds import Plan

    def measure(report: Report) -> Iterator[Row]:
        setting = _setting(pair, peers, dtype, threads, device, None, Plan(rounds), report)
        return bench_prefill(setting, [[length] * batch for length in lengths for batch in batches], report)

    _print("prefill, prompt tokens/s", measure, plot, as_json)


@click.group("peers")
def peers_group() -> None:
    """Other engines to measure beside ours, each in an environment of its own."""


@peers_group.command("install")
@click.argument("names", nargs=-1, required=True, type=click.Choice(["openvino", "vllm"]))
def install_command(names: tuple[str, ...]) -> None:
    """Download engines (up to 3 GB) into OVERFILL_HOME/envs."""
    from overfill.lab.bench.peers.environment import install
    from overfill.telemetry.progress import show_progress

    with show_progress() as report:
        installed = [install(name, report) for name in names]
    for python in installed:
        click.echo(python)


def _setting(
    pair: str,
    peers: str,
    dtype: DTypeName | None,
    threads: int | None,
    device: str,
    quantize: Quantization | None,
    plan: Any,
    report: Report,
) -> Setting:
    import os

    from overfill.lab.bench.engine import Setting
    from overfill.lab.bench.peers.choose import parse_peers
    from overfill.model.manifest import Pair
    from overfill.pair.store import resolve_pair

    names = parse_peers(peers)
    loaded = Pair.load(resolve_pair(pair, report))
    cores = len(os.sched_getaffinity(0))
    return Setting(loaded, dtype, quantize, device, threads or cores, names, plan)


def _print(title: str, measure: Callable[[Report], Iterator[Row]], plot: Path | None, as_json: bool) -> None:
    from overfill.lab.bench.rows import hints, rows_table
    from overfill.telemetry.progress import show_progress

    rows = []
    with show_progress() as report:
        for row in measure(report):
            rows.append(row)
            if as_json:
                click.echo(row.to_json())
    if plot is not None:
        from overfill.lab.bench.plots import save_speeds

        save_speeds(plot, title, rows)
    if as_json:
        return
    last = rows[-1]
    terminal = console()
    terminal.print(
        f"pair {last.pair}, {last.dtype}, {last.threads} threads, {last.device}: reads "
        f"{last.bandwidth / 1e9:.1f} GB/s, multiplies {last.matrix_rate / 1e9:,.0f} GFLOP/s"
    )
    terminal.print(rows_table(rows))
    for hint in hints(rows):
        terminal.print(hint)

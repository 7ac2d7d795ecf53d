"""``overfill bench decode`` and ``prefill``: our engine beside the machine's bound and vLLM."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

import click

from overfill.cli.options import dtype_option, option_errors
from overfill.cli.output import console
from overfill.lab.commands.bench_options import Counts, install_option, json_option, pair_option

if TYPE_CHECKING:
    from overfill.kv.spec import DTypeName, KvCacheDtype, Quantization
    from overfill.lab.bench.engine.measure import EngineSettings
    from overfill.lab.bench.engine.rows import Row
    from overfill.lab.bench.engine.turns import BenchPlan
    from overfill.telemetry.progress import Report

_F = TypeVar("_F", bound=Callable[..., Any])


def _common_options(command: _F) -> _F:
    for option in (
        json_option,
        click.option("--rounds", type=click.IntRange(1), default=5, show_default=True, help="Turns of each engine."),
        click.option(
            "--device", default="auto", show_default=True, help="Device of our engine: auto, cpu, cuda or cuda:N."
        ),
        click.option("--threads", type=click.IntRange(1), help="CPU threads of each engine.  [default: the cores]"),
        dtype_option,
        install_option,
        click.option("--vllm", is_flag=True, help="Measure vLLM with the full model too, in turns with our engine."),
        pair_option,
    ):
        command = option(command)
    return command


@click.command("decode", short_help="Tokens per second of decode, beside the bound and vLLM.")
@_common_options
@click.option(
    "--batch", "batches", type=Counts(), default="1,8,32,64", show_default=True, help="Sequences in a decode step."
)
@click.option("--context", type=click.IntRange(2), default=512, show_default=True, help="Mean tokens per sequence.")
@click.option("--steps", type=click.IntRange(1), default=16, show_default=True, help="Decode steps in a turn.")
@click.option(
    "--quantize", type=click.Choice(["none", "int8"]), help="Weights of the decoder.  [default: the pair's recipe]"
)
@click.option(
    "--kv-cache-dtype",
    type=click.Choice(["auto", "int8"]),
    default="auto",
    show_default=True,
    help="KV cache of the decoder. With int8, --pair identity also gets a decoder of its own.",
)
@click.option(
    "--adapters",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    help="Also measure the decoder with this many adapters, which the sequences have in turn.",
)
@click.option("--adapter-rank", type=click.IntRange(1), default=16, show_default=True, help="Rank of each adapter.")
@option_errors()
def decode_command(
    pair: str,
    vllm: bool,
    install_vllm: bool,
    dtype: DTypeName | None,
    threads: int | None,
    device: str,
    rounds: int,
    as_json: bool,
    batches: tuple[int, ...],
    context: int,
    steps: int,
    quantize: Quantization | None,
    kv_cache_dtype: KvCacheDtype,
    adapters: int,
    adapter_rank: int,
) -> None:
    """Measure decode: tokens per second of the full model and of the decoder, at each batch size.

    The bound is the speed that this machine's memory bandwidth and matrix rate allow. Both are measured in the same
    run, in turns with the engines.
    """
    from overfill.lab.bench.engine.measure import bench_decode
    from overfill.lab.bench.engine.turns import BenchPlan

    def measure(report: Report) -> Iterator[Row]:
        settings = _settings(pair, vllm, install_vllm, dtype, threads, device, BenchPlan(rounds, steps), report)
        settings = replace(
            settings, quantize=quantize, kv_cache_dtype=kv_cache_dtype, adapters=adapters, adapter_rank=adapter_rank
        )
        return bench_decode(settings, batches, context, report)

    _print(measure, as_json)


@click.command("prefill", short_help="Prompt tokens per second of prefill, beside the bound and vLLM.")
@_common_options
@click.option("--context", "lengths", type=Counts(), default="512,2048", show_default=True, help="Tokens per prompt.")
@click.option("--batch", "batches", type=Counts(), default="1,4", show_default=True, help="Prompts at once.")
@option_errors()
def prefill_command(
    pair: str,
    vllm: bool,
    install_vllm: bool,
    dtype: DTypeName | None,
    threads: int | None,
    device: str,
    rounds: int,
    as_json: bool,
    lengths: tuple[int, ...],
    batches: tuple[int, ...],
) -> None:
    """Measure prefill: prompt tokens per second of the full model, for one prompt and for several at once."""
    from overfill.lab.bench.engine.measure import bench_prefill
    from overfill.lab.bench.engine.turns import BenchPlan

    def measure(report: Report) -> Iterator[Row]:
        settings = _settings(pair, vllm, install_vllm, dtype, threads, device, BenchPlan(rounds), report)
        return bench_prefill(settings, [[length] * batch for length in lengths for batch in batches], report)

    _print(measure, as_json)


def _settings(
    pair: str,
    vllm: bool,
    install_vllm: bool,
    dtype: DTypeName | None,
    threads: int | None,
    device: str,
    plan: BenchPlan,
    report: Report,
) -> EngineSettings:
    from overfill.lab.bench.engine.measure import EngineSettings
    from overfill.lab.peers.environment import install
    from overfill.model.manifest import Pair
    from overfill.pair.store import resolve_pair

    if install_vllm:
        install("vllm", report)
    loaded = Pair.load(resolve_pair(pair, report))
    return EngineSettings(loaded, dtype, device, threads or len(os.sched_getaffinity(0)), vllm, plan)


def _print(measure: Callable[[Report], Iterator[Row]], as_json: bool) -> None:
    from overfill.cli.progress import show_progress
    from overfill.lab.bench.engine.rows import rows_table

    rows = []
    with show_progress() as report:
        for row in measure(report):
            rows.append(row)
            if as_json:
                click.echo(row.to_json())
    if as_json:
        return
    last = rows[-1]
    terminal = console()
    terminal.print(
        f"pair {last.pair}, {last.dtype}, {last.threads} threads, {last.device}: reads "
        f"{last.bandwidth / 1e9:.1f} GB/s, multiplies {last.matrix_rate / 1e9:,.0f} GFLOP/s"
    )
    terminal.print(rows_table(rows))

"""``overfill bench decode`` and ``prefill``: our engine beside the bound that this machine sets."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

import click

from overfill.cli.options import dtype_option, option_errors
from overfill.lab.commands.bench_options import COUNTS, json_option, load_pair

if TYPE_CHECKING:
    from overfill.kv.spec import KvCacheDtype, Quantization
    from overfill.lab.bench.engine.measure import EngineRun
    from overfill.lab.measurement import Measurement

_F = TypeVar("_F", bound=Callable[..., Any])


def _common_options(command: _F) -> _F:
    for option in (
        json_option,
        click.option("--rounds", type=click.IntRange(1), default=5, show_default=True, help="Turns of each engine."),
        click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N."),
        click.option("--threads", type=click.IntRange(1), help="CPU threads.  [default: the cores]"),
        dtype_option,
        click.option(
            "--pair", default="default", show_default=True, help="default, fast, identity, or the folder of a pair."
        ),
    ):
        command = option(command)
    return command


@click.command("decode", short_help="Tokens per second of decode, beside the bound.")
@_common_options
@click.option(
    "--batch", "batches", type=COUNTS, default="1,8,32,64", show_default=True, help="Sequences in a decode step."
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
    help="Also measure the decoder with this many adapters of rank 16, which the sequences have in turn.",
)
@option_errors()
def decode_command(
    as_json: bool,
    batches: tuple[int, ...],
    context: int,
    steps: int,
    quantize: Quantization | None,
    kv_cache_dtype: KvCacheDtype,
    adapters: int,
    **common: Any,
) -> int:
    """Measure decode: tokens per second of the full model and of the decoder, at each batch size.

    The peer `machine` is the speed that this machine's memory bandwidth and matrix rate allow. Both are measured in
    the same run, in turns with the engines.
    """
    return _print(
        lambda run: run.decode(batches, context, steps, quantize, kv_cache_dtype, adapters), as_json, **common
    )


@click.command("prefill", short_help="Prompt tokens per second of prefill, beside the bound.")
@_common_options
@click.option("--context", "lengths", type=COUNTS, default="512,2048", show_default=True, help="Tokens per prompt.")
@click.option("--batch", "batches", type=COUNTS, default="1,4", show_default=True, help="Prompts at once.")
@option_errors()
def prefill_command(as_json: bool, lengths: tuple[int, ...], batches: tuple[int, ...], **common: Any) -> int:
    """Measure prefill: prompt tokens per second of the full model, for one prompt and for several at once."""
    return _print(lambda run: run.prefill(lengths, batches), as_json, **common)


def _print(measure: Callable[[EngineRun], Iterator[Measurement]], as_json: bool, pair: str, **common: Any) -> int:
    from overfill.cli.progress import show_progress
    from overfill.lab.bench.engine.measure import EngineRun
    from overfill.lab.measurement import print_measurements

    loaded = load_pair(pair)
    with show_progress() as report:
        found = list(measure(EngineRun(loaded, report=report, **common)))
    return print_measurements(found, as_json)

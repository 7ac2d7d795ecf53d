"""``overfill bench links``: time to first token and exposed handoff between hosts, by link and codec."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import click
from rich.table import Table

from overfill.cli.options import dtype_option
from overfill.cli.output import console
from overfill.lab.commands.bench_options import Counts, json_option, load_pair, log_line, pair_option

if TYPE_CHECKING:
    from overfill.kv.spec import DTypeName
    from overfill.lab.bench.links.measure import LinkResult

# Not imported from the module that measures: it loads torch, and --help should not.
_LINKS = ("plain", "1gbit", "100mbit", "20ms", "bad", "bad-bbr")
_CODECS = ("raw", "int8")


@click.command("links", short_help="First token and handoff between hosts, by link and codec (needs root).")
@pair_option
@click.option(
    "--link", "links", type=click.Choice(_LINKS), multiple=True,
    help="Link of the prefill worker's host: plain; with a rate of 1gbit or 100mbit; with a delay of 20ms one way; bad "
    "with 20 ms, 1 % loss and 100 Mbit/s; bad-bbr is bad with TCP's BBR in place of CUBIC. Repeat for several.  "
    "[default: all]",
)  # fmt: skip
@click.option(
    "--kv-codec", "codecs", type=click.Choice(_CODECS), multiple=True,
    help="Encoding of KV between the workers; repeat for several.  [default: all]",
)  # fmt: skip
@click.option("--tokens", type=Counts(), default="512,2048", show_default=True, help="Lengths of the prompts.")
@dtype_option
@click.option("--threads", type=click.IntRange(1), default=1, show_default=True, help="CPU threads of each worker.")
@click.option("--rounds", type=click.IntRange(1), default=3, show_default=True, help="Measured requests of each kind.")
@json_option
def links_command(
    pair: str,
    links: tuple[str, ...],
    codecs: tuple[str, ...],
    tokens: tuple[int, ...],
    dtype: DTypeName | None,
    threads: int,
    rounds: int,
    as_json: bool,
) -> int:
    """Measure what a handoff costs a request when the stages run on hosts of their own.

    Starts a router, a prefill and a decode worker in a network namespace each, with mutual TLS. Changes the link of the
    prefill worker's host and sends random prompts, each of them twice. Prints medians of the time to first token and of
    the time that the second token waits for KV, beside their physical bounds. The second time, a prompt is in the
    prefill worker's prefix cache, so that no prefill hides the transfer. Needs Linux and root.
    """
    from overfill.lab.bench.links.measure import measure_links

    measured = measure_links(
        load_pair(pair),
        links or _LINKS,
        codecs or _CODECS,
        tokens,
        dtype=dtype,
        threads=threads,
        rounds=rounds,
        log=log_line,
    )
    if as_json:
        for result in measured:
            for one in result.measurements():
                click.echo(one.to_json())
    else:
        console().print(_table(measured))
    return 0


def _table(results: Iterable[LinkResult]) -> Table:
    table = Table()
    words = ("link", "codec", "prompt")
    for column in (*words, "tokens", "KV, MB", "first token, ms", "bound", "exposed handoff, ms", "bound"):
        table.add_column(column, justify="left" if column in words else "right", no_wrap=True)
    for one in results:
        times = (one.ttft, one.least_ttft, one.exposed, one.least_exposed)
        milliseconds = [f"{1e3 * seconds:,.0f}" for seconds in times]
        prompt = "cached" if one.cached else "new"
        table.add_row(one.link, one.codec, prompt, f"{one.tokens:,}", f"{one.kv_bytes / 1e6:.1f}", *milliseconds)
    return table

"""``overfill bench http``: what the OpenAI endpoint costs beside gRPC."""

from __future__ import annotations

import click

from overfill.lab.bench.figure import print_figures
from overfill.process.extras import require


@click.command("http")
@click.option(
    "--pair", default="default", show_default=True, help="Whose tokenizer and geometry the mock workers have."
)
@click.option("--rounds", type=click.IntRange(2), default=500, show_default=True, help="Requests over each protocol.")
@click.option(
    "--streams", type=click.IntRange(1), default=32, show_default=True, help="Answers at once, for saturation."
)
@click.option("--tokens", type=click.IntRange(2), default=200, show_default=True, help="Length of those answers.")
@click.option("--json", "as_json", is_flag=True, help="A JSON line per figure on stdout.")
def http_command(pair: str, rounds: int, streams: int, tokens: int, as_json: bool) -> int:
    """Compare HTTP with gRPC on a router with mock workers; the client shares their cores.

    Exits 1 when HTTP adds more than 2 ms to the median time to first token.
    """
    require("loadtest,server", "`overfill bench http`", "tokenizers", "xxhash")  # in the processes that it starts
    from overfill.lab.bench.protocols import compare
    from overfill.pair.store import resolve_pair
    from overfill.telemetry.progress import show_progress

    with show_progress() as report:
        folder = resolve_pair(pair, report)
    return print_figures(compare(folder, rounds, streams, tokens), as_json)
